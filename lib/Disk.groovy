import java.nio.file.FileVisitResult
import java.nio.file.Files
import java.nio.file.LinkOption
import java.nio.file.Path
import java.nio.file.SimpleFileVisitor
import java.nio.file.attribute.BasicFileAttributes
import java.util.regex.Pattern
import nextflow.Global

/** The room that a run takes: whether the disks have it, and what --cleanup frees while the run goes on. */
class Disk {

    /** Bytes in the work folder and among the results for each byte that is read; measured, docs/resources.md says on what. */
    private static final double WORK = 1.5, RESULTS = 1.0
    /** The same with --cleanup, where both share files. */
    private static final double WORK_CLEANED = 1.6
    /** Files of a slide that are looked at, at most. */
    private static final int MOST_FILES = 20_000
    /** Of a machine's folder, what is read; the others lie there too. */
    private static final Map<String, Pattern> READ = [
        xenium: ~/(morphology_focus.*|ch\d{4}.*|transcripts)\.(ome\.tiff?|parquet|csv(\.gz)?)|.*_boundaries\.parquet/,
        cosmx: ~/(?i).*_F\d+\.(tiff?|jpe?g|png)|.*(_tx_file|_exprMat_file|-polygons)\.csv(\.gz)?/,
        visium_hd: ~/(?i).*\.(tiff?|btf)|(filtered_feature_(bc|cell)_matrix)\.h5|.*\.geojson/,
        merscope: ~/mosaic_.*\.tiff?|detected_transcripts\..*|cell_boundaries\.parquet|feature_data_.*\.hdf5/,
    ]
    private static final Pattern PLANE = ~/mosaic_.*_z(\d+)\.tiff?/
    private static String mode = null

    /**
     * Before anything starts: end the run, or say so, where the disks have too little room for the slides.
     *
     * @param slides what `Inputs.slides` gave
     */
    static void check(Collection<Map> slides, Map params, Object workflow) {
        def how = workflow.resume && params.disk_check == 'error' ? 'warn' : params.disk_check
        if (how == 'none' || params.estimate || params.preview || workflow.stubRun) return
        long read = slides.sum(0L) { slide -> readBytes(slide) } as long
        def work = workflow.workDir as Path
        def results = Inputs.place(params.outdir.toString(), workflow.launchDir as Path)
        def said = shortage(read, params.cleanup as boolean, room('work folder', work), room('results', results), sameDisk(work, results))
        if (!said) return
        System.err.println("${how == 'error' ? 'error' : 'WARN'}: [disk-too-small] ${said}")
        System.err.flush()
        if (how == 'error') System.exit(1)
    }

    /** What is short, in words; '' if nothing is. Rooms are [name, free bytes or -1 where that is not known]. */
    static String shortage(long read, boolean cleanup, List work, List results, boolean same) {
        def needs = same ? [[work[0], cleanup ? WORK_CLEANED : WORK + RESULTS, work[1]]]
            : [[work[0], cleanup ? WORK_CLEANED : WORK, work[1]], [results[0], RESULTS, results[1]]]
        def short_ = needs.findAll { _name, factor, free -> free >= 0 && read * factor > free }
        if (!short_) return ''
        def parts = short_.collect { name, factor, free -> "${same ? 'work folder and results' : name}: about ${gb(read * factor)}, free ${gb(free)}" }
        def hint = cleanup ? 'point -work-dir or --outdir at a larger disk' : 'point -work-dir or --outdir at a larger disk, add --cleanup'
        return "the disk is too small for ${gb(read)} of input: ${parts.join('; ')}\n  hint: ${hint}, or go on with --disk_check warn"
    }

    /** How a slide's store is published: by hard links with --cleanup, where work folder and results lie on one disk. */
    static synchronized String publishMode(Map params) {
        if (!params.cleanup || params.publish_dir_mode != 'copy') return params.publish_dir_mode
        if (mode == null) mode = canLink(Global.session.workDir as Path, Run.folder) ? 'link' : 'copy'
        return mode
    }

    /**
     * Delete what lies in folders that a task of this run made. The folders and what says of them what they are stay, so that
     * -resume finds what the task emitted, and does not make it again where nobody needs it any more.
     */
    static void empty(Object folders, Path workDir = Global.session.workDir as Path) {
        (folders instanceof Collection ? folders : [folders]).each { folder ->
            def path = folder as Path
            if (isOurs(path, workDir)) Files.walkFileTree(path, new SimpleFileVisitor<Path>() {
                @Override
                FileVisitResult visitFile(Path file, BasicFileAttributes attributes) {
                    if (file.fileName.toString() != 'zarr.json') Files.deleteIfExists(file)
                    return FileVisitResult.CONTINUE
                }
            })
        }
    }

    /** Whether a folder lies in a task's folder, itself and not by a link: work/3f/8a…/bundles/bundle_000.zarr. */
    static boolean isOurs(Path path, Path workDir = Global.session.workDir as Path) {
        try {
            if (!Files.isDirectory(path, LinkOption.NOFOLLOW_LINKS)) return false
            def work = workDir.toRealPath()
            def real = path.toRealPath()
            if (!real.startsWith(work) || path.fileSystem != work.fileSystem) return false
            def below = work.relativize(real)
            return below.nameCount > 2 && below.getName(0).toString() ==~ /[0-9a-f]{2}/ && below.getName(1).toString() ==~ /[0-9a-f]{30}/
        }
        catch (Exception ignored) {
            return false
        }
    }

    /** Bytes that are read of a slide, of a projection along z as if there were one plane. */
    static long readBytes(Map slide) {
        return [slide.path, slide.transcripts, slide.prior_cells].findAll().sum(0L) { path -> bytes(path as Path, slide.technology) } as long
    }

    private static long bytes(Path path, String technology) {
        long images = 0, others = 0
        def planes = [] as Set
        try {
            if (Files.isRegularFile(path)) return Files.size(path)
            int seen = 0
            def stream = Files.walk(path, 3)
            stream.withCloseable { files ->
                def each = files.iterator()
                while (each.hasNext() && seen++ < MOST_FILES) {
                    def file = each.next()
                    def name = file.fileName.toString()
                    if (!Files.isRegularFile(file) || (READ[technology] && !(name ==~ READ[technology]))) continue
                    def plane = name =~ PLANE
                    if (plane) planes << plane[0][1]
                    if (plane) images += Files.size(file)
                    else others += Files.size(file)
                }
            }
        }
        catch (Exception ignored) {
            return others // what cannot be read is told by the task that must
        }
        return images.intdiv(Math.max(planes.size(), 1)) + others
    }

    private static List room(String name, Path folder) {
        try {
            return [name, Files.getFileStore(existing(folder)).usableSpace]
        }
        catch (Exception ignored) {
            return [name, -1L] // an object store has no end
        }
    }

    private static boolean sameDisk(Path a, Path b) {
        try {
            return Files.getFileStore(existing(a)) == Files.getFileStore(existing(b))
        }
        catch (Exception ignored) {
            return false
        }
    }

    private static Path existing(Path folder) {
        def path = folder.toAbsolutePath()
        while (path.parent && !Files.exists(path)) path = path.parent
        return path
    }

    private static boolean canLink(Path work, Path results) {
        def probe = null
        def link = null
        try {
            if (work.fileSystem != results.fileSystem) return false
            Files.createDirectories(work)
            Files.createDirectories(results)
            probe = Files.createTempFile(work, '.link', '')
            link = results.resolve(probe.fileName.toString())
            Files.createLink(link, probe)
            return true
        }
        catch (Exception ignored) {
            return false
        }
        finally {
            [link, probe].findAll().each { file -> Files.deleteIfExists(file) }
        }
    }

    private static String gb(Number bytes) {
        double value = bytes as double
        return value >= 1e9 ? String.format(Locale.ROOT, '%.1f GB', value / 1e9) : String.format(Locale.ROOT, '%.0f MB', value / 1e6)
    }

}
