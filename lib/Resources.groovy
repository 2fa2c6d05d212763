import groovy.json.JsonSlurper
import groovy.json.JsonSlurperClassic
import java.nio.file.Files
import java.nio.file.Path
import nextflow.Global
import nextflow.util.Duration
import nextflow.util.MemoryUnit

/**
 * Memory and time that a task asks for, from how much it gets.
 *
 * Stores and bundles say in their zarr.json how much they hold (core/sizes.py); of other files the bytes count. The
 * coefficients stand in assets/resources.json, from where the package takes them too (costs/table.py), and a test
 * compares both. Nothing of this is an input of a task: other coefficients never make a finished task run again.
 *
 *     memory { Resources.memory(task, settings, [raw, cells]) }
 *     time { Resources.time(task, settings, [raw, cells]) }
 */
class Resources {

    private static final List<String> NAMES =
        ['pixels', 'transcripts', 'cells', 'bytes', 'outline_bytes', 'patch_pixels', 'patch_transcripts']
    /** Files of a folder that are looked at, at most. */
    private static final int MOST_FILES = 20_000
    /** Metadata larger than this is not read in the head job. */
    private static final long MOST_METADATA = 64L << 20
    private static final int MOST_REMEMBERED = 4096

    private static Map known = null
    /** Store → how much there is in it: memory and time ask one after the other. */
    private static final Map<String, Map<String, Long>> remembered = Collections.synchronizedMap(
        new LinkedHashMap<String, Map<String, Long>>() {
            @Override
            protected boolean removeEldestEntry(Map.Entry<String, Map<String, Long>> eldest) { return size() > MOST_REMEMBERED }
        }
    )

    /** Memory of a task: `task` knows process and attempt, `settings` is its JSON, `inputs` are paths and lists of such. */
    static MemoryUnit memory(Object task, Object settings, Object inputs) {
        return new MemoryUnit(memoryMb(table(), name(table(), task), memorySetting(settings), sizes(inputs), attempt(task)) << 20)
    }

    /** Time limit of a task. */
    static Duration time(Object task, Object settings, Object inputs) {
        return new Duration(minutes(table(), name(table(), task), sizes(inputs), attempt(task)) * 60_000L)
    }

    /** As `costs.table.memory_mb` in Python. */
    static long memoryMb(Map table, String process, long memorySetting, Map<String, Long> sizes, int attempt) {
        def costs = table.processes[process].memory
        double streamed = Math.min((double) memorySetting, amount(costs.streamed_mb, sizes))
        double needed = (costs.base_mb + streamed + amount(costs.held_mb, sizes)) * table.memory_safety
        long once = Math.max((long) table.least_mb, (long) (Math.ceil(needed / 256.0d) * 256))
        return Math.min(once * attempt, (long) table.most_mb)
    }

    /** As `costs.table.minutes` in Python. */
    static long minutes(Map table, String process, Map<String, Long> sizes, int attempt) {
        def costs = table.processes[process].cpu
        double seconds = (costs.base_s + amount(costs.per_million_s, sizes)) * table.time_safety
        long once = Math.max((long) table.least_minutes, (long) Math.ceil(seconds / 60.0d))
        return Math.min(once * attempt, (long) table.most_minutes)
    }

    /** How much there is in all that a task gets, as `size_of` in core/sizes.py. */
    static Map<String, Long> sizes(Object inputs) {
        def total = [:]
        paths(inputs).each { path ->
            sizeOf(path).each { name, count ->
                def before = (total[name] ?: 0L) as long
                total[name] = name.startsWith('patch_') ? Math.max(before, count) : before + count
            }
        }
        return total
    }

    /** What the task ESTIMATE is asked, as JSON: the sheet where it lies, and the parameters that the run was given. */
    static String request(Map params, Path projectDir, Path launchDir) {
        def schema = new JsonSlurper().parseText(Files.readString(projectDir.resolve('nextflow_schema.json')))
        def known = schema['$defs'].collectMany { _group, content -> content.properties.entrySet() }
        // Files of the run are named from where it was started; none says how much there is to do.
        def given = known
            .findAll { entry -> !entry.value.format && !(entry.key in ['input', 'outdir', 'help', 'help_full', 'estimate']) }
            .collectEntries { entry -> [entry.key, params[entry.key]] }
            .findAll { _name, value -> value != null }
        def sheet = params.input.toString()
        return Inputs.toJson(given + [sheet: sheet.contains('://') ? sheet : launchDir.resolve(sheet).toAbsolutePath().toString()])
    }

    private static double amount(Map coefficients, Map<String, Long> sizes) {
        double sum = 0
        coefficients.each { name, each -> sum += (each as double) * ((sizes[name] ?: 0L) as double) / 1e6d }
        return sum
    }

    /** The entry of a task's process; of one included under a longer name (PREVIEW_STARDIST) that of its own. */
    static String name(Map table, Object task) {
        def found = task.process.toString().tokenize(':').last()
        return table.processes.keySet().findAll { known -> found.startsWith(known) }.max { known -> known.length() } ?: 'OTHERS'
    }

    private static int attempt(Object task) {
        return (task.attempt ?: 1) as int
    }

    private static long memorySetting(Object settings) {
        def found = settings?.toString() =~ /"memory_mb": ?(\d+)/
        return found ? found[0][1] as long : (long) table().memory_setting_mb
    }

    private static synchronized Map table() {
        if (known == null) {
            // Several tasks ask at once; JsonSlurper's own maps fill only when they are looked into, which one thread may do.
            known = new JsonSlurperClassic().parseText(Files.readString(Global.session.baseDir.resolve('assets/resources.json'))) as Map
        }
        return known
    }

    private static List<Path> paths(Object inputs) {
        if (inputs instanceof Path) return [inputs as Path]
        return inputs instanceof Collection ? inputs.collectMany { item -> paths(item) } : []
    }

    /** Of what cannot be read nothing is known: the task gets the base values. */
    private static Map<String, Long> sizeOf(Path path) {
        try {
            def real = path.toRealPath()
            def key = real.toUri().toString()
            def found = remembered[key]
            if (found == null) remembered[key] = found = recorded(real) ?: ofFiles(real)
            return found
        }
        catch (Exception ignored) {
            return [:]
        }
    }

    private static Map<String, Long> recorded(Path store) {
        try {
            def file = store.resolve('zarr.json')
            if (!Files.isRegularFile(file) || Files.size(file) > MOST_METADATA) return [:]
            def size = new JsonSlurper().parseText(Files.readString(file)).attributes.cellquilt.size
            return NAMES.findAll { name -> size[name] != null }.collectEntries { name -> [name, size[name] as long] }
        }
        catch (Exception ignored) {
            return [:]
        }
    }

    private static Map<String, Long> ofFiles(Path path) {
        if (Files.isRegularFile(path)) return [bytes: Files.size(path)]
        long total = 0, outlines = 0
        int seen = 0
        def folders = [path]
        while (folders && seen < MOST_FILES) {
            def entries = Files.newDirectoryStream(folders.removeLast())
            entries.withCloseable { stream ->
                stream.each { entry ->
                    seen++
                    if (Files.isDirectory(entry)) folders << entry
                    else if (Files.isRegularFile(entry)) {
                        long bytes = Files.size(entry)
                        total += bytes
                        if (entry.fileName.toString().contains('boundaries')) outlines += bytes
                    }
                }
            }
        }
        return [bytes: total, outline_bytes: outlines].findAll { _name, count -> count }
    }

}
