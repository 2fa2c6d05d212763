import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import java.nio.channels.FileChannel
import java.nio.channels.OverlappingFileLockException
import java.nio.file.Files
import java.nio.file.LinkOption
import java.nio.file.Path
import java.nio.file.StandardCopyOption
import java.nio.file.StandardOpenOption
import java.nio.file.attribute.FileTime
import nextflow.Global
import nextflow.file.FileHelper
import org.yaml.snakeyaml.DumperOptions
import org.yaml.snakeyaml.Yaml

/** What a run says of itself: parameters and versions beside the results, and at its end what became of every sample. */
class Run {

    /** Of a stage that failed and left its slide done, what the slide lacks. */
    private static final Map<String, String> LACKING = [
        EXPORT: 'not exported', EXPLORER: 'no folder for Xenium Explorer', CLUSTER: 'not clustered', ANNOTATE: 'cell types missing',
        SPLIT: 'not split into regions', STATS: 'not measured in space',
    ]
    private static Map<String, Map> slides = [:]
    private static String outdir = ''
    /** Of the results, once the run has begun. */
    static Path folder = null
    private static boolean preview = false
    /** Held as long as this process lives. */
    private static FileChannel lock = null
    /** The table of tasks that Nextflow writes, and what it is called as long as it grows. */
    private static Path trace = null, growing = null
    /** Stands there as long as not all is published. */
    private static Path unfinished = null

    // ------------------------------------------------------------------------------------------------ what main.nf calls

    /** Take the folder of the results for this run alone, and write what the run was asked for: what was given, and defaults. */
    static void begin(Map params, Map<String, Map> slides, Object workflow) {
        this.slides = slides
        outdir = params.outdir.toString()
        folder = Inputs.place(outdir, workflow.launchDir as Path)
        preview = params.preview as boolean
        def info = folder.resolve('pipeline_info')
        Files.createDirectories(info)
        takeLock(info.resolve('.lock'))
        keepTrace(workflow)
        if (lock) beginPublishing(info.resolve('.unfinished'))
        def all = new TreeMap(params)
        Inputs.effective.each { name, value -> if (all[name] == null) all[name] = value }
        Files.writeString(info.resolve('params.json'), JsonOutput.prettyPrint(JsonOutput.toJson(all)) + '\n')
    }

    /** A lock of the operating system goes with its process, however that ends. Object stores have none. */
    private static void takeLock(Path file) {
        if (file.fileSystem != java.nio.file.FileSystems.default) return
        def taken = null
        try {
            lock = FileChannel.open(file, StandardOpenOption.CREATE, StandardOpenOption.WRITE)
            taken = lock.tryLock()
        }
        catch (OverlappingFileLockException ignored) {
            taken = null
        }
        catch (IOException ignored) {
            return // a file system that knows no locks
        }
        if (!taken) {
            System.err.println("error: [outdir-in-use] another run writes into ${outdir} (wait until it ends, or choose another --outdir)")
            System.err.flush()
            System.exit(1)
        }
    }

    /**
     * Nextflow copies results file by file, and with -resume leaves alone what stands there already: of a run that was killed
     * in between, that would be half a store. What such a run published is taken away, to be published again.
     *
     * @param mark stands there as long as results may be incomplete
     */
    private static void beginPublishing(Path mark) {
        if (Files.exists(mark)) {
            def since = changed(mark)
            published().findAll { path -> newest(path) >= since }.each { path ->
                Files.isSymbolicLink(path) ? Files.delete(path) : FileHelper.deletePath(path)
            }
            Files.delete(mark)
        }
        Files.createFile(mark)
        unfinished = mark
    }

    /** What tasks publish, as far as it is there, and nothing that somebody else put beside it. */
    private static List<Path> published() {
        def ofSlide = ['qc.json', 'report.html', 'preview.html', 'exports', 'explorer', 'comparison.json', 'comparison.tsv', 'cluster_markers.tsv', 'stats']
        def names = slides.keySet().collectMany { id -> (ofSlide + ["${id}.zarr", "${id}.h5ad"]).collect { name -> "${id}/${name}" } }
        names += ['cohort/domains', 'cohort/report.html', 'cohort/spatial.html', 'cohort/stats', 'multiqc/cellquilt_samples_mqc.tsv']
        names += ['samples.tsv', 'pipeline_info/checksums.tsv']
        return names.collect { name -> folder.resolve(name.toString()) }.findAll { path -> Files.exists(path, LinkOption.NOFOLLOW_LINKS) }
    }

    private static FileTime newest(Path path) {
        return Files.walk(path).withCloseable { found -> found.toList() }.collect { file -> changed(file) }.max()
    }

    /** When a file was put there, whatever time it bears. */
    private static FileTime changed(Path path) {
        try {
            return Files.getAttribute(path, 'unix:ctime', LinkOption.NOFOLLOW_LINKS) as FileTime
        }
        catch (UnsupportedOperationException | IllegalArgumentException ignored) {
            return Files.getLastModifiedTime(path, LinkOption.NOFOLLOW_LINKS)
        }
    }

    /**
     * A run that is refused later has emptied the table of tasks before it comes to ask for the lock: this one's gets another
     * name until its end.
     */
    private static void keepTrace(Object workflow) {
        def named = Global.session.config.trace?.file ?: "${outdir}/pipeline_info/trace.txt"
        trace = growing = Inputs.place(named.toString(), workflow.launchDir as Path)
        if (!lock || !Files.exists(trace)) return
        Files.list(trace.parent).filter { file -> file.fileName.toString() ==~ /trace\.\d+\.txt/ }.toList().each { left -> Files.delete(left) }
        growing = trace.resolveSibling("trace.${ProcessHandle.current().pid()}.txt")
        Files.move(trace, growing)
    }

    /** All stages' versions in one file: stage → package → version, or versions where tasks of a stage differ. */
    static void versions(List<String> texts) {
        def found = new TreeMap()
        texts.each { text ->
            (new Yaml().load(text) ?: [:]).each { stage, packages ->
                packages.each { name, version -> found.computeIfAbsent(stage, { new TreeMap() }).computeIfAbsent(name, { new TreeSet() }) << version.toString() }
            }
        }
        def named = found.collectEntries { stage, packages -> [stage, packages.collectEntries { name, several -> [name, several.join(', ')] }] }
        def style = new DumperOptions()
        style.defaultFlowStyle = DumperOptions.FlowStyle.BLOCK
        Files.writeString(folder.resolve('pipeline_info').resolve('versions.yml'), new Yaml(style).dump(named))
    }

    /** Say how the run ended, name each failed sample with its cause, and write that into samples.tsv; the summary's text. */
    static String summary(Object workflow) {
        def tasks = lastAttempts(growing, workflow)
        if (unfinished && !Global.session.aborted) Files.deleteIfExists(unfinished)
        if (growing != trace) Files.move(growing, trace, StandardCopyOption.REPLACE_EXISTING)
        def ends = preview ? ['PREVIEW', 'PREVIEW_STARDIST'] : ['REPORT', 'DOMAINS_ANNOTATE']
        def done = tasks.findAll { task -> stage(task) in ends && task.status in ['COMPLETED', 'CACHED'] }*.tag as Set
        def failed = slides.values().findAll { slide -> !(slide.id in done) }.collectEntries { slide ->
            [slide.id, [status: 'failed'] + failure(slide, tasks, workflow)]
        }
        // A compared method, an export, domains or cell types that do not come through leave their slide done.
        def lacking = slides.values().findAll { slide -> slide.id in done && failedTasks(slide, tasks) }.collectEntries { slide ->
            def failure = failure(slide, tasks, workflow)
            def methods = failedTasks(slide, tasks).collect { task -> task.tag.tokenize(':')[1] }.findAll().unique()
            def lacks = failure.stage.startsWith('DOMAINS_') ? 'domains missing' : LACKING[failure.stage] ?: "${methods.join(', ') ?: 'methods'} not compared"
            [slide.id, [status: 'done'] + failure + [cause: "${lacks}: ${failure.cause}".toString()]]
        }
        def samples = preview ? [] : byColumn(tsv(folder.resolve('samples.tsv'))).findAll { row -> row.sample in done }
        // In which there was nothing to find domains from.
        def without = samples.findAll { row -> row.status == 'done' && row.cause }
            .collectEntries { row -> [row.sample, row.subMap(['status', 'stage', 'error', 'cause', 'hint', 'log'])] }
        def report = tasks.find { task -> task.status == 'FAILED' && stage(task) == 'DOMAINS_REPORT' }

        def lines = ["cellquilt: ${slides.size() - failed.size()} of ${slides.size()} samples done in ${workflow.duration}; results in ${outdir}"]
        def gpuHours = samples.collect { row -> hours(row.gpu_hours) }.sum(0.0)
        if (gpuHours > 0) lines << "  ${gpuHours} hours of GPUs"
        (failed + without + lacking).each { id, failure ->
            lines << "  ${failure.status}: ${id}${failure.stage ? " in ${failure.stage}" : ''}: ${failure.cause}"
            if (failure.hint) lines << "    hint: ${failure.hint}"
            if (failure.log) lines << "    log: ${failure.log}"
        }
        if (report) lines << "  no report of the cohort: ${found(report, workflow).cause}"
        def space = tasks.find { task -> task.status == 'FAILED' && stage(task) == 'STATS_COHORT' }
        if (space) lines << "  no spatial statistics of the cohort: ${found(space, workflow).cause}"
        if ((failed || lacking) && !preview && Files.isDirectory(folder)) {
            try {
                recordFailures(folder.resolve('samples.tsv'), slides.keySet(), failed + lacking)
            }
            catch (IOException problem) {
                lines << "  this is not in samples.tsv, which cannot be written: ${withoutFolders(problem.message)}".toString()
            }
        }
        return lines.join('\n')
    }

    /** The lines of a table (TSV), its header first; none where it is not there. */
    private static List<List<String>> tsv(Path table) {
        return Files.exists(table) ? Files.readAllLines(table)*.split('\t', -1)*.toList() : []
    }

    private static List<Map<String, String>> byColumn(List<List<String>> lines) {
        return lines.drop(1).collect { line -> [lines[0], line].transpose().collectEntries() }
    }

    private static BigDecimal hours(String text) {
        return text?.isBigDecimal() ? text.toBigDecimal() : 0.0
    }

    // ------------------------------------------------------------------------------------------------------------- failures

    /** The last attempt of every task, from the trace file. */
    private static List<Map<String, String>> lastAttempts(Path trace, Object workflow) {
        int expected = workflow.stats.succeededCount + workflow.stats.failedCount + workflow.stats.cachedCount
        def rows = []
        for (int attempt = 0; attempt < 20; attempt++) { // the file is written beside the run, a moment later
            rows = tsv(trace)
            if (rows.size() > expected) break
            sleep(100)
        }
        return byColumn(rows).collectEntries { task -> [[task.process, task.tag], task] }.values() as List
    }

    private static String stage(Map task) {
        return task.process.tokenize(':').last()
    }

    /**
     * The tasks of a slide that failed, those of the chosen method first. A tag is liver_1:cellpose+proseg:bundle_000. What
     * is done for the whole cohort counts for every slide whose cells it was done for.
     */
    private static List<Map<String, String>> failedTasks(Map slide, List<Map<String, String>> tasks) {
        def others = slide.methods.drop(1)
        def of = { id -> tasks.findAll { task -> task.tag.tokenize(':')[0] == id } }
        def own = of(slide.id)
        if (!own && slide.parent) own = of(slide.parent) // a region that it never came to
        def ofCohort = tasks.findAll { task -> stage(task) in ['DOMAINS_TRAIN', 'DOMAINS_ASSIGN'] }
        def inCohort = own.any { task -> stage(task) == 'DOMAINS_PREPARE' && task.status in ['COMPLETED', 'CACHED'] }
        return (own + (inCohort ? ofCohort : []))
            .findAll { task -> task.status == 'FAILED' }
            .sort { task -> task.tag.tokenize(':')[1] in others ? 1 : 0 }
    }

    /** Why a slide, or a method compared on it, did not come through: [stage, error, cause, hint, log]. */
    private static Map failure(Map slide, List<Map<String, String>> tasks, Object workflow) {
        def failed = failedTasks(slide, tasks)
        def task = failed ? failed[0] : null
        if (!task) {
            // Of what ended the run outside of a task, Nextflow's report has the cause in words.
            def report = workflow.errorReport?.toString() ?: ''
            def cause = firstLine(workflow.errorMessage) ?: firstLine(report.contains('Caused by:') ? report.split('Caused by:')[1] : '') ?: 'the run ended before it'
            def full = cause.contains('No space left on device') || isFull(workflow.workDir as Path)
            def ended = [error: 'run-ended', hint: 'start again with -resume']
            if (full) ended = [error: 'disk-full', hint: 'free some space or point -work-dir or --outdir elsewhere, then -resume']
            return [stage: '', error: ended.error, cause: withoutFolders(cause), hint: ended.hint, log: '']
        }
        return found(task, workflow)
    }

    /** What a failed task left behind: [stage, error, cause, hint, log]. */
    private static Map found(Map task, Object workflow) {
        def (start, rest) = task.hash.tokenize('/')
        def parent = (workflow.workDir as Path).resolve(start)
        def folder = Files.isDirectory(parent) ? Files.list(parent).filter { path -> path.fileName.toString().startsWith(rest) }.findFirst().orElse(null) : null
        def log = folder?.resolve('.command.err')
        def lines = log && Files.exists(log) ? log.toFile().readLines('UTF-8') : []
        def record = lines.reverse().findResult { line -> line.startsWith('CELLQUILT_ERROR ') ? parsed(line.substring(16)) : null }
        def cause = record?.message ?: lines.reverse().find { line -> line.trim() } ?: "exit code ${task.exit}"
        def hint = record?.hint ?: ''
        def known = [error: 'task-failed']
        if (record?.code) known.error = record.code
        def begun = folder && Files.exists(folder.resolve('.command.begin'))
        if (!record && !lines && !begun) cause = firstLine(workflow.errorMessage) ?: 'the task could not be started'
        if (!record && (task.exit.isInteger() ? task.exit.toInteger() in 130..145 : begun)) {
            cause = task.exit.isInteger() ? "killed (exit code ${task.exit}): too little memory or time" : 'ended without an exit code: too little time, or its machine was lost'
            hint = 'give the process more (process.memory, process.time in a configuration), then -resume'
            known = [error: 'task-killed']
        }
        if (!record && isFull(workflow.workDir as Path)) {
            cause = 'no space left in the work folder'
            hint = 'free some space or point -work-dir elsewhere, then -resume'
            known = [error: 'disk-full']
        }
        def makers = folder && record ? makers(folder, record.message, workflow) : []
        if (makers) hint = [hint, "${makers.join(' and ')} made it: if it is damaged, delete that folder, then -resume"].findAll().join('; ')
        return [stage: stage(task)] + known + [cause: withoutFolders(cause), hint: withoutFolders(hint), log: log ? relative(log, workflow) : '']
    }

    /** Where there is no room a task cannot even say so. */
    private static boolean isFull(Path folder) {
        try {
            return Files.getFileStore(folder).usableSpace < (1 << 16)
        }
        catch (IOException | UnsupportedOperationException ignored) {
            return false
        }
    }

    /**
     * The work folders of the tasks that made what an error names. -resume takes what a finished task made as it is, so a
     * work file that was damaged later fails again and again.
     */
    private static List<String> makers(Path folder, String message, Object workflow) {
        def work = (workflow.workDir as Path).toRealPath()
        return Files.list(folder).filter { path -> Files.isSymbolicLink(path) && message.contains(path.fileName.toString()) }.toList()
            .findAll { link -> Files.exists(link) }*.toRealPath()
            .findAll { path -> path.startsWith(work) && path.nameCount > work.nameCount + 2 }
            .collect { path -> relative(work.resolve(work.relativize(path).subpath(0, 2)), workflow) }.unique().sort()
    }

    private static String firstLine(Object text) {
        return text?.toString()?.readLines()?.find { line -> line.trim() }
    }

    private static Object parsed(String text) {
        try {
            return new JsonSlurper().parseText(text)
        }
        catch (Exception ignored) {
            return null
        }
    }

    private static String relative(Path path, Object workflow) {
        def launch = workflow.launchDir as Path
        return path.startsWith(launch) ? launch.relativize(path).toString() : path.subpath(path.nameCount - 3, path.nameCount).toString()
    }

    /** No folder of this machine in what is published: of an absolute path only the name stays. */
    private static String withoutFolders(String text) {
        def part = /[^\/:;,"'()<>]+/ // folders may hold blanks
        return text.replaceAll(/(?<![\w.\/])(?:\/${part})+\/([^\s\/:;,"'()<>]+)/) { all -> "…/${all[1]}" }.replaceAll(/\s+/, ' ').trim()
    }

    /** Fill the rows of the samples of which something failed; the table is made anew where the run did not get to it. */
    private static void recordFailures(Path table, Collection<String> samples, Map<String, Map> failed) {
        def rows = tsv(table) ?: [['sample', 'status', 'verdict']]
        def header = rows[0]
        failed.values()[0].keySet().each { column -> if (!(column in header)) header << column }
        def known = rows.drop(1).collectEntries { row -> [row[0], row] }
        rows = [header] + samples.collect { id ->
            def row = known[id] ?: [id, 'done']
            while (row.size() < header.size()) row << ''
            failed[id].each { column, value -> row[header.indexOf(column)] = value }
            row
        }
        Files.deleteIfExists(table) // it may be a link into the work folder
        Files.writeString(table, rows.collect { row -> row.join('\t') }.join('\n') + '\n')
    }

}
