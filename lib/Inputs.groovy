import groovy.json.JsonSlurper
import java.nio.charset.CharacterCodingException
import java.nio.charset.StandardCharsets
import java.nio.file.Files
import java.nio.file.Path
import java.util.regex.Pattern
import nextflow.Global
import nextflow.file.FileHelper
import nextflow.util.Escape

/**
 * The parameters and the sample sheet, checked in the head job before anything starts.
 *
 * What is allowed stands in nextflow_schema.json and assets/schema_input.json. The command line does the same in
 * core/sheet.py and core/settings.py with the same messages; tests/cases/bad_inputs.json drives both.
 */
class Inputs {

    private static final List<String> REQUIRED_COLUMNS = ['sample', 'technology']
    /** Columns of files, which a slide's regions do without. */
    private static final List<String> FILES = ['path', 'transcripts', 'prior_cells', 'he_image', 'he_matrix', 'regions', 'truth']
    /** A metadata column this similar to a parameter's name is probably meant to be one. */
    private static final double NEARLY = 0.85
    private static final String SHIPPED_MODEL = 'nuclei'
    private static final String SHIPPED_DOMAINS = 'default'
    /** Method → the parameter with its model: a file or folder, or a name that the method itself knows. */
    private static final Map<String, String> MODELS = [cellpose: 'cellpose_model', stardist: 'stardist_model_type']
    /** Technology of a cell table → what its path ends in. */
    private static final Map<String, List<String>> TABLE_SUFFIXES = [anndata: ['.h5ad', '.zarr'], spatialdata: ['.zarr']]
    /** Files of the folder of a model of domains. */
    private static final List<String> MODEL_FILES = ['config.json', 'model.safetensors']
    /** A model's name on a hub. */
    private static final Pattern HUB_ID = ~/[A-Za-z0-9_][A-Za-z0-9_.-]*\/[A-Za-z0-9_][A-Za-z0-9_.-]*/
    /** Parameters that only training of the published recipe has. */
    private static final List<String> OF_TRAINING = ['domains_max_epochs', 'domains_processes', 'domains_checkpoints']
    /** Parameters that a site's configuration brings, not the user. */
    private static final Pattern SITE_PARAMETERS = ~/(config_profile|custom_config|igenomes)_.*|max_(cpus|memory|time)|genomes/
    /** Characters that Nextflow's scripts leave to the shell. */
    private static final Pattern SHELL_CHARACTERS = ~/[$\[\]{}*?~]/
    /** Nextflow's own options, which have one dash. */
    private static final List<String> NEXTFLOW_OPTIONS = [
        'resume', 'profile', 'work-dir', 'params-file', 'stub', 'stub-run', 'ansi-log', 'with-report', 'with-trace',
        'with-timeline', 'with-dag', 'bg', 'latest', 'revision', 'entry', 'config', 'offline', 'name', 'c', 'r', 'w', 'N'
    ]
    private static final Map<String, String> KIND_NAMES = [
        integer: 'a whole number', number: 'a number', boolean: 'true or false', string: 'text'
    ]

    /** The run's values in full: what was given, over the preset's, over the defaults. */
    static Map effective = [:]
    /** Among the settings of every task: another version's results are not taken for this one's by -resume. */
    private static Map version = [:]

    // ------------------------------------------------------------------------------------------------ what main.nf calls

    /** The parameters as text, in groups; with `full` the hidden ones too. */
    static String help(Object projectDir, Object full) {
        def schema = readJson(projectDir, 'nextflow_schema.json')
        def lines = ['Usage: nextflow run main.nf --input sheet.csv --outdir results [-profile …] [-resume] [--parameter value …]', '']
        schema['$defs'].each { _name, group ->
            def shown = group.properties.findAll { _key, property -> full || !property.hidden }
            if (!shown) return
            lines << group.title
            shown.each { name, property ->
                def notes = [property.description]
                if (property.enum) notes << "One of ${property.enum.join(', ')}."
                if (property.items) notes << "Some of ${property.items.enum.join(', ')}."
                if (property.default != null) notes << "[default: ${property.default}]"
                lines << "  --${name.padRight(28)} ${notes.join(' ')}".toString()
            }
            lines << ''
        }
        lines << 'Parameters of a sample may also be columns of the sheet. docs/parameters.md says more.'
        if (!full) lines << '--help_full shows the hidden parameters too.'
        return lines.join('\n')
    }

    /**
     * The slides of the run; where anything is wrong, all mistakes in one message and the end of the run.
     *
     * @return one map a slide, and one a region of it, whose parent it is: [id, parent, technology, is_table, path, transcripts, prior_cells, he_image, he_matrix, regions, truth, source, metadata,
     *     compare_markers, …, domains_model, methods, images, by_method, settings, weights]. Files that are not given are
     *     []. A table is one of cells that were found elsewhere. Methods are those whose cells
     *     are published, the chosen one first ('cellpose+proseg', 'vendor', …); images those that segment the image, each
     *     once ('cellpose', 'vendor'); exports the programs to write the cells for; explorer whether to write the viewer's folder; by_method says of all of them [image, engine, molecules, settings, weights]:
     *     what segments the image ('cellpose', its engine 'cellpose3') and what the transcripts, '' where nothing does, and
     *     stage → JSON of all settings that the stage depends on. The slide's own settings and weights are those of the chosen method.
     */
    static List<Map> slides(Map params, Object projectDir, Object launchDir) {
        def errors = []
        version = [version: Global.session.manifest.version ?: '']
        def slides = examine(params, projectDir, launchDir, errors)
        if (!errors) missingEnvironments(slides, projectDir as Path, errors)
        if (errors) {
            def lines = errors.collect { mistake -> "\n  - ${line(mistake)}" }
            System.err.println("error: [input-invalid] The input has mistakes; nothing was started:${lines.join('')}")
            System.err.flush()
            System.exit(1)
        }
        return slides
    }

    /** As `slides`, but the mistakes go to `errors`, each as [code, message, hint]. */
    static List<Map> examine(Map params, Object projectDir, Object launchDir, List<Map> errors) {
        def properties = properties(projectDir)
        def values = checkParameters(params, properties, errors)
        if (!errors) missingFiles(values, properties, launchDir as Path, '', errors)
        if (!errors.any { mistake -> mistake.code.startsWith('parameter-') }) impossibleDomains(values, properties, launchDir as Path, errors)
        if (!params.input) return []
        def schema = readJson(projectDir, 'assets/schema_input.json')
        def rows = checkSheet(params.input.toString(), launchDir as Path, properties, schema, errors)
        if (errors) return []
        def known = readJson(projectDir, 'nextflow_schema.json')
        // What a preset brings holds where neither the run nor the sample says otherwise.
        def isGiven = { name -> [name, *(properties[name].aliases ?: [])].any { key -> params[key] != null } }
        def brought = { name -> (known.presets[name] ?: [:]).findAll { key, _value -> !isGiven(key) } }
        effective = values + brought(values.preset)
        def sheetFolder = (launchDir as Path).resolve(params.input.toString()).toAbsolutePath().parent
        def ids = rows.collectEntries { row -> [row.sample, row.sample] }
        def ofRegions = []
        def slides = rows.collectMany { row ->
            def own = values + brought(row.overrides.preset ?: values.preset) + row.overrides
            // A folder that tasks write to, wherever they run.
            if (own.domains_checkpoints) own.domains_checkpoints = (launchDir as Path).resolve(own.domains_checkpoints).normalize().toString()
            def weights = { method -> weights(method, row, values, launchDir as Path, sheetFolder, errors) }
            def files = properties.findAll { _name, property -> property.format in ['file-path', 'directory-path'] }.collectEntries { name, property ->
                def given = property.format == 'directory-path' ? own[name] && own[name] != SHIPPED_DOMAINS : namesFile(property, own[name])
                [name, given ? (name in row.overrides ? sheetFolder : launchDir as Path).resolve(own[name]).normalize() : []]
            }
            if (row.technology in schema.items.properties.technology.tables) notOfTable(row, own, errors)
            else notOfSlide(row, own, known.transcript_methods, schema, errors)
            notOfImage(row, own, errors)
            notOfTypes(row, own, errors)
            def whole = slide(row, own, known, weights, row.technology in schema.items.properties.technology.tables) + files
            own.preview ? [whole] : [whole] + regions(row, whole, ids, ofRegions)
        }
        errors.addAll(ofRegions)
        return errors ? [] : slides
    }

    /** What somebody wrote: the address of an object, or a path relative to a folder. */
    static Path place(String given, Path folder) {
        return given.contains('://') ? FileHelper.asPath(given) : folder.resolve(given)
    }

    /** A mistake as one line. */
    static String line(Map mistake) {
        return mistake.message + (mistake.hint ? " (${mistake.hint})" : '')
    }

    // ------------------------------------------------------------------------------------------------------------ schemas

    private static Object readJson(Object projectDir, String name) {
        return new JsonSlurper().parseText(Files.readString((projectDir as Path).resolve(name)))
    }

    /** Parameter → its properties in the schema, with the names of the required ones marked. */
    private static Map<String, Map> properties(Object projectDir) {
        def found = [:]
        readJson(projectDir, 'nextflow_schema.json')['$defs'].each { _group, content ->
            content.properties.each { name, property ->
                found[name] = property + [name: name, required: name in (content.required ?: [])]
            }
        }
        return found
    }

    /** Pipeline stage → names of the settings that it depends on. */
    private static Map<String, List<String>> stages(Map schema) {
        def found = [:].withDefault { [] }
        schema['$defs'].each { _group, content ->
            content.stages.each { stage -> found[stage].addAll(content.properties.keySet()) }
        }
        return found
    }

    private static Map<String, String> aliases(Map<String, Map> properties) {
        return properties.collectMany { name, property -> (property.aliases ?: []).collect { alias -> [alias, name] } }.collectEntries()
    }

    // --------------------------------------------------------------------------------------------------------- parameters

    private static Map<String, Object> checkParameters(Map params, Map<String, Map> properties, List<Map> errors) {
        def aliases = aliases(properties)
        def values = properties.collectEntries { name, property -> [name, typed(property, property.default)] }
        asTyped(params).each { key, value ->
            def name = aliases.getOrDefault(key, key)
            if (!properties.containsKey(name)) {
                if (key in NEXTFLOW_OPTIONS) {
                    errors << error('parameter-unknown', "unknown parameter \"${key}\"", "Nextflow's own options have one dash: -${key}")
                }
                else {
                    errors << error('parameter-unknown', "unknown parameter \"${key}\"", didYouMean(key.replace('-', '_'), properties.keySet()).replaceFirst(/(?s)^known: .*/, '--help lists them'))
                }
                return
            }
            collectInto(errors) {
                def given = check(properties[name], value)
                if (given != null) values[name] = given
            }
        }
        properties.findAll { _name, property -> property.required }.each { name, property ->
            if (!params[name]) {
                errors << error('parameter-missing', "--${name} is missing", property.description)
            }
        }
        return values
    }

    /** What was given, by the names that the user typed: Nextflow turns kebab-case into camelCase. */
    private static Map<String, Object> asTyped(Map params) {
        def command = "${Global.session?.commandLine ?: ''} "
        return params.findAll { key, _value -> !(key ==~ SITE_PARAMETERS) }.collectEntries { key, value ->
            def kebab = key.replaceAll(/(?<=.)([A-Z])/) { all -> '-' + all[1].toLowerCase() }
            [command =~ /--${Pattern.quote(kebab)}[\s=]/ ? kebab : key, value]
        }
    }

    /** A value as the setting's type; as `settings.check` in Python. */
    private static Object check(Map property, Object value) {
        if (value == null) return null
        def typed = typed(property, value)
        if (property.enum && !(typed in property.enum)) {
            fail('parameter-choice', "${property.name} is ${show(value)}; expected one of ${property.enum.join(', ')}", didYouMean(value.toString(), property.enum))
        }
        if (property.items) typed.each { choice ->
            if (!(choice in property.items.enum)) {
                fail('parameter-choice', "${property.name} names ${show(choice)}; expected some of ${property.items.enum.join(', ')}", didYouMean(choice, property.items.enum))
            }
            if (typed.count(choice) > 1) fail('parameter-twice', "${property.name} names ${show(choice)} twice")
        }
        if (property.pattern && !(typed.toString() =~ property.pattern)) {
            fail('parameter-choice', "${property.name} is ${show(value)}; expected ${property.description}")
        }
        if (typed instanceof Number) {
            double number = typed
            if ((property.minimum != null && number < property.minimum) || (property.maximum != null && number > property.maximum)) {
                def range = []
                if (property.minimum != null) range << "at least ${plain(property.minimum)}"
                if (property.maximum != null) range << "at most ${plain(property.maximum)}"
                fail('parameter-range', "${property.name} is ${show(value)}; expected ${range ? range.join(' and ') : 'a number'}")
            }
        }
        return typed
    }

    private static Object typed(Map property, Object value) {
        if (value == null) return null
        def wrong = { -> fail('parameter-type', "${property.name} is ${show(value)}; expected ${KIND_NAMES[property.type]}") }
        def text = value.toString()
        switch (property.type) {
            case 'boolean':
                if (value instanceof Boolean) return value
                if (text.toLowerCase() in ['true', 'false']) return text.toLowerCase() == 'true'
                return wrong()
            case ['integer', 'number']:
                if (value instanceof Boolean) return wrong()
                def number
                if (text.trim() ==~ /[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?/) number = Double.parseDouble(text.trim())
                else return wrong()
                if (property.type == 'number') return number
                return number == Math.rint(number) ? (long) number : wrong()
            default:
                if (property.list) {
                    def parts = value instanceof Collection ? value.collect { part -> part.toString() } : text.split(',') as List
                    return parts.collect { part -> part.trim() }.findAll()
                }
                return value instanceof Boolean || value instanceof Map || value instanceof Collection ? wrong() : text
        }
    }

    private static String show(Object value) {
        return value instanceof CharSequence ? "\"${value}\"" : value.toString()
    }

    /** As Python's format "g": 0.01, 100, 1e-06. */
    private static String plain(Number number) {
        def exact = new BigDecimal(number.toString()).stripTrailingZeros()
        if (exact.signum() == 0 || Math.abs(exact) >= 0.0001) return exact.signum() ? exact.toPlainString() : '0'
        int exponent = exact.precision() - exact.scale() - 1
        return "${exact.movePointLeft(exponent).toPlainString()}e-${String.valueOf(-exponent).padLeft(2, '0')}"
    }

    // -------------------------------------------------------------------------------------------------------------- sheet

    private static List<Map> checkSheet(String given, Path launchDir, Map<String, Map> properties, Map schema, List<Map> errors) {
        def path = place(given, launchDir)
        def sheet = path.fileName.toString()
        def fields = schema.items.properties
        def records = []
        def rows = []
        def rowOf = [:]
        def wellFormed = collectInto(errors) { split(sheet, sheetText(given, path), records) }
        if (!records) return []
        def columns = columns(sheet, records[0], properties, fields, errors)
        if (!columns) return []
        records.drop(1).eachWithIndex { values, index ->
            if (values.any { value -> value.trim() }) {
                def row = row(path, index + 2, columns, values, properties, fields, rowOf, errors)
                if (row) rows << row
            }
        }
        if (!wellFormed) {
            errors << errors.removeAt(errors.findIndexOf { mistake -> mistake.code == 'sheet-quotes' }) // where reading stopped
        }
        if (!rowOf && !errors.any { mistake -> mistake.code ==~ /(sheet|sample|technology|path)-.*/ }) {
            errors << error('sheet-no-rows', "${sheet}: has no samples", 'add one row a sample')
        }
        return rows
    }

    private static String sheetText(String given, Path path) {
        if (!Files.isRegularFile(path)) {
            fail('sheet-missing', "sample sheet not found: ${given}", 'is --input right?')
        }
        def sheet = path.fileName
        def text
        try {
            text = StandardCharsets.UTF_8.newDecoder().decode(java.nio.ByteBuffer.wrap(Files.readAllBytes(path))).toString()
        }
        catch (CharacterCodingException ignored) {
            fail('sheet-encoding', "${sheet}: is not UTF-8 text", 'save it as CSV UTF-8')
        }
        if (text.startsWith('\uFEFF')) text = text.substring(1)
        if (text.contains('\0')) fail('sheet-encoding', "${sheet}: is not UTF-8 text", 'save it as CSV UTF-8')
        if (!text.trim()) fail('sheet-empty', "${sheet}: is empty", "expected the columns ${REQUIRED_COLUMNS.join(', ')}, path")
        return text.replace('\r\n', '\n').replace('\r', '\n')
    }

    /** Rows by RFC 4180 into `records`; the delimiter is the one that the header has most of. */
    private static void split(String sheet, String text, List<List<String>> records) {
        def header = text.replaceFirst(/^\n+/, '').split('\n', 2)[0]
        def delimiter = [',', '\t', ';'].max { mark -> header.count(mark) }
        int at = 0
        def quotes = { -> fail('sheet-quotes', "${sheet} row ${records.size() + 1}: quotes do not match", 'write a quote inside a quoted field as ""') }
        while (at < text.length()) {
            def values = []
            while (true) {
                def value = new StringBuilder()
                if (text.startsWith('"', at)) {
                    while (true) {
                        int end = text.indexOf('"', at + 1)
                        if (end < 0) quotes()
                        value << text.substring(at + 1, end)
                        at = end + 1
                        if (!text.startsWith('"', at)) break
                        value << '"'
                    }
                }
                else {
                    int end = [text.indexOf(delimiter, at), text.indexOf('\n', at), text.length()].findAll { position -> position >= 0 }.min()
                    value << text.substring(at, end)
                    at = end
                }
                values << value.toString()
                if (!text.startsWith(delimiter, at)) break
                at++
            }
            if (at < text.length() && !text.startsWith('\n', at)) quotes()
            at++
            records << values
        }
    }

    /** The columns' names, parameters by their full name; an empty list where required ones are absent. */
    private static List<String> columns(String sheet, List<String> header, Map<String, Map> properties, Map fields, List<Map> errors) {
        def aliases = aliases(properties)
        def names = header*.trim()
        while (names && !names.last()) names.removeLast()
        def columns = names.collect { name ->
            def snake = name.replace('-', '_')
            def found = aliases.getOrDefault(snake, snake)
            found in properties || found in fields ? found : name
        }
        names.eachWithIndex { name, index ->
            if (!name) errors << error('sheet-column-unnamed', "${sheet}: column ${index + 1} has no name")
        }
        columns.countBy { column -> column }.each { column, count ->
            if (column && count > 1) errors << error('sheet-column-twice', "${sheet}: column \"${column}\" stands ${count} times")
        }
        columns.toUnique().findAll { column -> column in properties && !properties[column].per_sample }.each { column ->
            errors << error('sheet-column-run', "${sheet}: column \"${column}\" is a parameter of the whole run, not of a sample",
                "give it as --${column}, or name the column otherwise")
        }
        def missing = REQUIRED_COLUMNS.findAll { required -> !(required in columns) }
        missing.each { required ->
            errors << error('sheet-column-missing', "${sheet}: has no column \"${required}\"",
                didYouMean(required, names.findAll()).replace('known:', 'columns:'))
        }
        if (missing) return []
        columns.findAll { column -> !(column in properties) && !(column in fields) }.each { column ->
            def near = nearest(column, properties.keySet(), NEARLY)
            if (near) System.err.println("WARN: ${sheet}: column \"${column}\" is kept as metadata; the parameter is called \"${near}\"")
        }
        return columns
    }

    /** One row as [sample, technology, files, source, overrides, metadata]; null where it has mistakes. */
    private static Map row(Path path, int number, List<String> columns, List<String> values, Map<String, Map> properties, Map fields, Map<String, Integer> rowOf, List<Map> errors) {
        def where = "${path.fileName} row ${number}".toString()
        int before = errors.size()
        while (values.size() > columns.size() && !values.last().trim()) values = values.init()
        if (values.size() > columns.size()) {
            errors << error('sheet-row-length', "${where}: has ${values.size()} fields; the header has ${columns.size()}",
                'put fields that hold the delimiter in quotes')
        }
        def cells = [columns, values].transpose().collectEntries()

        def sample = (cells.remove('sample') ?: '').trim()
        if (!sample) {
            errors << error('sample-missing', "${where}: sample is empty")
        }
        else {
            where += ", sample \"${sample}\""
            if (!(sample ==~ fields.sample.pattern)) {
                errors << error('sample-name', "${where}: the name cannot be used",
                    'at most 64 letters, digits, dots, dashes and underscores, the first a letter or digit')
            }
            else if (rowOf.containsKey(sample)) {
                errors << error('sample-twice', "${where}: the name stands in row ${rowOf[sample]} already", 'each row needs a name of its own')
            }
        }
        rowOf.putIfAbsent(sample, number)

        def technologies = fields.technology.enum
        def technology = (cells.remove('technology') ?: '').trim()
        if (!technology) {
            errors << error('technology-missing', "${where}: technology is empty", "one of ${technologies.toSorted().join(', ')}")
        }
        else if (!(technology in technologies)) {
            errors << error('technology-unknown', "${where}: unknown technology \"${technology}\"", didYouMean(technology, technologies))
        }

        def source = cells.path ?: ''
        def alone = technology in fields.technology.without_image // its transcripts are all there is
        if (!source.trim() && !(alone && cells.transcripts?.trim())) {
            errors << error('path-missing', "${where}: ${alone ? 'path and transcripts are' : 'path is'} empty")
        }
        if (alone && !source.trim()) source = cells.transcripts ?: ''
        def files = [:]
        fields.findAll { _name, field -> field.format == 'path' }.keySet().each { column ->
            def written = cells.remove(column) ?: ''
            if (written.trim()) {
                files[column] = written.contains('://') ? FileHelper.asPath(written) : path.toAbsolutePath().parent.resolve(written).normalize()
                if (written =~ /[\n\r]/) {
                    errors << error('path-line-break', "${where}: ${column} holds a line break", 'rename the file, or mend the quotes')
                }
                else if (!exists(files[column])) {
                    errors << error('path-not-found', "${where}: ${column} not found: ${files[column]}")
                }
                else if (files[column].toString() =~ SHELL_CHARACTERS && !stagesAnyPath()) {
                    errors << error('path-characters', "${where}: this Nextflow cannot stage ${files[column]}", 'rename it without $[]{}*?~')
                }
            }
        }

        def overrides = [:]
        def metadata = [:]
        cells.each { column, text ->
            if (!(column in properties)) {
                metadata[column] = text.trim()
            }
            else if (text.trim() && properties[column].per_sample) {
                collectInto(errors, "${where}: ") { overrides[column] = check(properties[column], text.trim()) }
            }
        }
        missingFiles(overrides, properties, path.toAbsolutePath().parent, "${where}: ", errors)
        return errors.size() > before ? null : [sample: sample, technology: technology, files: files, source: source, overrides: overrides, metadata: metadata]
    }

    /**
     * Nextflow's scripts escape most characters of a path for the shell, but leave variables, braces and globs alone. Have it
     * escape those too; whether that worked.
     */
    private static boolean stagesAnyPath() {
        try {
            def field = Escape.getDeclaredField('SPECIAL_CHARS')
            field.accessible = true
            def known = field.get(null) as List // the list itself, not a copy
            ['$', '[', ']', '{', '}', '*', '?', '~'].each { letter -> if (!(letter in known)) known.add(letter) }
            return Escape.path('$') == '\\$'
        }
        catch (ReflectiveOperationException | RuntimeException ignored) {
            return false
        }
    }

    /** Whether a parameter's value is the path of a file. */
    private static boolean namesFile(Map property, Object value) {
        return value && property.format == 'file-path' && (!property.file_pattern || value.toString() =~ property.file_pattern)
    }

    /** Mistakes of the parameters that name files; relative ones lie in the folder. */
    private static void missingFiles(Map values, Map<String, Map> properties, Path folder, String where, List<Map> errors) {
        values.keySet().findAll { name -> namesFile(properties[name], values[name]) }.sort().each { name ->
            def path = folder.resolve(values[name].toString()).normalize()
            if (!exists(path) || !Files.isRegularFile(path)) {
                errors << error('path-not-found', "${where}${name} not found: ${path}", didYouMeanFile(path))
            }
            else if (path.toString() =~ SHELL_CHARACTERS && !stagesAnyPath()) {
                errors << error('path-characters', "${where}this Nextflow cannot stage ${path}", 'rename it without $[]{}*?~')
            }
        }
    }

    /** As `errors.did_you_mean_file` in Python. */
    private static String didYouMeanFile(Path path) {
        def beside = exists(path.parent) && Files.isDirectory(path.parent) ? path.parent.toFile().list() as List : []
        def near = nearest(path.fileName.toString(), beside, 0.6)
        return near ? "did you mean \"${near}\"?" : ''
    }

    private static boolean exists(Path path) {
        try {
            return Files.exists(path)
        }
        catch (Exception ignored) {
            return false
        }
    }

    // -------------------------------------------------------------------------------------------------------------- slides

    /** The methods of a slide, the chosen one first, then those compared with it; a chain's are joined by a plus. */
    private static List<String> methods(Map own) {
        return ([own.segmentation.replace(',', '+')] + (own.compare ?: [])).unique()
    }

    /** Where tasks run in environments of this folder, say that one is not there before hours of other tasks. */
    private static void missingEnvironments(Collection<Map> slides, Path projectDir, List<Map> errors) {
        def engines = slides.collectMany { slide -> slide.is_table ? [] : slide.by_method.values()*.engine }
        def needed = ['core'] + engines.findAll { engine -> engine in ['cellpose3', 'cellpose4', 'stardist'] }.toUnique().toSorted()
        if (effective.domains != 'none' || slides.any { slide -> slide.clusters || slide.annotates }) needed << 'domains'
        def process = Global.session.config.process ?: [:]
        if (process.any { key, of -> key.toString().startsWith('withLabel:env_') && (of.container || !(of.beforeScript instanceof Closure)) }) return
        def missing = needed.findAll { name -> !Files.isDirectory(projectDir.resolve(".venv/${name}/bin")) }
        missing.each { name -> errors << error('environment-missing', "there is no environment for ${name}", "make setup STAGES=\"${needed.join(' ')}\"") }
    }

    /** What is asked of domains and cannot be had. */
    private static void impossibleDomains(Map values, Map<String, Map> properties, Path folder, List<Map> errors) {
        def (mode, model) = [values.domains, values.domains_model]
        if (mode == 'none') return
        if (mode == 'finetune' && !model) {
            errors << error('domains-model', 'domains is finetune, and domains_model names no model', "name a model's folder, or ${SHIPPED_DOMAINS} for the shipped one")
        }
        else if (mode == 'train' && model) {
            errors << error('domains-model', 'domains is train, which starts without domains_model', 'set domains to finetune to go on from the model, or leave it out')
        }
        else if (model && model != SHIPPED_DOMAINS) {
            def path = folder.resolve(model).normalize()
            def absent = MODEL_FILES.findAll { name -> !exists(path.resolve(name)) || !Files.isRegularFile(path.resolve(name)) }
            if (!exists(path)) {
                def fetched = model ==~ HUB_ID ? "of a hub it is fetched first: cellquilt domains fetch ${model} --output FOLDER, then name the folder" : ''
                errors << error('path-not-found', "domains_model not found: ${path}", didYouMeanFile(path) ?: fetched)
            }
            else if (absent) {
                errors << error('domains-model', "domains_model is no model: ${path} has no ${absent.join(' and no ')}", 'name the folder that holds both files')
            }
            else if (path.toString() =~ SHELL_CHARACTERS && !stagesAnyPath()) {
                errors << error('path-characters', "this Nextflow cannot stage ${path}", 'rename it without $[]{}*?~')
            }
        }
        (mode == 'train' && values.domains_recipe != 'published' ? OF_TRAINING : []).each { name ->
            if (values[name] && values[name] != properties[name].default) {
                errors << error('domains-epochs', "${name} is for published models; domains_recipe is ${values.domains_recipe}", "leave ${name} out")
            }
        }
        def (network, weights) = [values.domains_image_model, values.domains_image_weights]
        if (network && !network.contains(':') && !weights) {
            errors << error('domains-image-weights', "domains_image_model is ${network}, and domains_image_weights names no file; nothing is downloaded", 'give the file with its weights')
        }
        if (weights && (!network || network.contains(':'))) {
            errors << error('domains-image-weights', 'domains_image_weights is given, and domains_image_model names no network of torchvision or timm',
                'leave domains_image_weights out, or name the network')
        }
        if (values.domains_n && values.domains_resolution) {
            errors << error('domains-number', 'domains_n and domains_resolution both say how many domains there are', 'leave one of them out')
        }
    }

    /** What is asked of a cell table that was made elsewhere and cannot be had of it. */
    private static void notOfTable(Map row, Map own, List<Map> errors) {
        def where = "sample \"${row.sample}\""
        def suffixes = TABLE_SUFFIXES[row.technology]
        def name = row.files.path.fileName.toString()
        if (!suffixes.any { suffix -> name.toLowerCase().endsWith(suffix) }) {
            errors << error('table-suffix', "${where}: path is ${name}; technology ${row.technology} is read from ${suffixes.join(' or ')}", 'convert it first')
        }
        if (row.files.regions) {
            errors << error('regions-table', "${where}: technology ${row.technology} is a table, and regions split slides", 'leave regions empty')
        }
        if (own.preview) {
            errors << error('table-preview', "${where}: technology ${row.technology} has nothing to preview", 'leave it out of the sheet, or leave preview out')
        }
        else if (own.domains == 'none') {
            errors << error('table-without-domains', "${where}: technology ${row.technology} has its cells, and no domains are to be found", 'set domains to zeroshot, train or finetune')
        }
    }

    /** What is asked of an aligned image and cannot be had. */
    private static void notOfImage(Map row, Map own, List<Map> errors) {
        def where = "sample \"${row.sample}\""
        if (row.files.he_matrix && !row.files.he_image) {
            errors << error('he-image-missing', "${where}: he_matrix is given, and he_image is empty", 'give both, or leave he_matrix empty')
        }
        if (own.domains != 'none' && own.domains_image_model && !row.files.he_image && !own.domains_image) {
            errors << error('domains-image-missing', "${where}: domains_image_model is to look at an image, and there is none", 'give he_image or domains_image in the sheet')
        }
    }

    /**
     * The slides that a slide's regions make, as core/regions.py names them: everything of the slide holds for them, but only
     * the chosen method's cells are theirs, and nothing is exported. Outlines are looked at where the slide is read.
     */
    private static List<Map> regions(Map row, Map whole, Map<String, String> ids, List<Map> errors) {
        if (!whole.regions || whole.is_table) return []
        def where = "sample \"${row.sample}\""
        def names = []
        collectInto(errors, "${where}: ") { names = regionNames(row.files.regions).collect { slug -> regionSample(row.sample, slug) } }
        names.each { name ->
            if (name in ids) {
                errors << error('sample-twice', "${where}: a region makes the sample \"${name}\", which sample \"${ids[name]}\" brings already", 'rename the region or the sample')
            }
            ids.putIfAbsent(name, row.sample)
        }
        def files = FILES.collectEntries { column -> [column, []] }
        return names.collect { name -> whole + files + [id: name, parent: whole.id, methods: whole.methods.take(1), exports: []] }
    }

    /** As `read_features` in Python: of each region, what of its name can be part of a sample's. */
    private static List<String> regionNames(Path file) {
        def name = file.fileName
        def hint = 'export it from QuPath, or from Xenium Explorer, as GeoJSON'
        def found = null
        try {
            found = new JsonSlurper().parseText(new String(Files.readAllBytes(file), StandardCharsets.UTF_8).replaceFirst(/^\uFEFF/, ''))
        }
        catch (Exception ignored) {
            fail('regions-unreadable', "${name} is no GeoJSON", hint)
        }
        if (found instanceof Map) found = found.containsKey('features') ? found.features : [found]
        if (!(found instanceof List) || !found.every { one -> one instanceof Map && one.containsKey('geometry') }) fail('regions-unreadable', "${name} is no GeoJSON", hint)
        if (!found) fail('regions-empty', "${name} has no regions", hint)
        def known = [:]
        return found.withIndex(1).collect { one, number ->
            def about = one.properties instanceof Map ? one.properties : [:]
            def called = (about.name ?: (about.classification instanceof Map ? about.classification.name : null) ?: '').toString().trim()
            def slug = called.replaceAll(/[^A-Za-z0-9.-]+/, '_').replaceAll(/^_+|_+\$/, '')
            if (!slug) fail('regions-name', "${name}: region ${number} has no name of letters and digits", 'name each region')
            if (slug.toLowerCase() in known) {
                fail('regions-twice', "${name}: two regions are called \"${known[slug.toLowerCase()]}\" and \"${called}\"", 'give each region a name of its own')
            }
            known[slug.toLowerCase()] = called
            slug
        }
    }

    private static String regionSample(String sample, String slug) {
        def name = "${sample}_${slug}".toString()
        if (name.length() > 64) {
            fail('regions-name', "with the region's name \"${slug}\" it has ${name.length()} letters", 'shorten one of them: 64 are the most')
        }
        return name
    }

    /** What is asked of cell types and cannot be had. */
    private static void notOfTypes(Map row, Map own, List<Map> errors) {
        def where = "sample \"${row.sample}\""
        if (own.domains != 'none' && own.domains_image_model && row.files.he_image && row.files.regions) {
            errors << error('regions-he-image', "${where}: domains_image_model is to look at he_image, and the slide is split into regions", 'leave one of them out')
        }
        if (own.annotate_markers && own.annotate_reference) {
            errors << error('annotate-both', "${where}: annotate_markers and annotate_reference both name cells", 'leave one of them out')
        }
        if (own.annotate_reference && !own.annotate_label) {
            errors << error('annotate-label', "${where}: annotate_reference is given, and annotate_label names no column of it", 'name the column with the cell types')
        }
    }

    /** What is asked of a slide and cannot be had of it. */
    private static void notOfSlide(Map row, Map own, List<String> ofTranscripts, Map schema, List<Map> errors) {
        def where = "sample \"${row.sample}\""
        if (own.compare && methods(own).size() == 1) {
            errors << error('compare-nothing', "${where}: compare names only the chosen method, ${own.segmentation}", 'name another one, or leave compare out')
        }
        if ('xeniumranger' in (own.export ?: []) && row.technology != 'xenium') {
            errors << error('export-not-xenium', "${where}: technology ${row.technology} has nothing that xeniumranger reads", 'give export as a column of the sheet')
        }
        if (!(row.technology in schema.items.properties.technology.without_image)) return
        methods(own).each { chain ->
            def first = chain.tokenize('+')[0]
            if (first == 'vendor' && !row.files.prior_cells) {
                errors << error('segmentation-no-cells', "${where}: technology ${row.technology} has no cells of the machine for ${chain}",
                    'give prior_cells, or choose another method')
            }
            else if (first != 'vendor' && !(first in ofTranscripts)) {
                errors << error('segmentation-no-image', "${where}: technology ${row.technology} has no image for ${chain}",
                    "set segmentation to ${ofTranscripts.join(' or ')}, or with prior_cells to vendor")
            }
        }
    }

    private static Map slide(Map row, Map own, Map schema, Closure weights, boolean isTable) {
        // 'cellpose+proseg': a method for the image, whose cells are the prior of one for the transcripts; or one of them.
        def moleculesOf = { chain -> chain.tokenize('+').find { method -> method in schema.transcript_methods } ?: '' }
        def imageOf = { chain -> chain.tokenize('+').find { method -> method != moleculesOf(chain) } ?: '' }
        def methods = methods(own)
        def images = methods.collect(imageOf).findAll().unique()
        def stages = stages(schema)
        def byMethod = (methods + images).unique().collectEntries { method ->
            def (image, molecules) = [imageOf(method), moleculesOf(method)]
            def settings = stages.collectEntries { stage, names ->
                def given = names.collectEntries { name -> [name, own[name]] }
                if ('segmentation' in names) given.segmentation = (stage.endsWith('_transcripts') ? molecules : image) ?: null
                // CONVERT must know what it reads (the source is the path as the user knows it), AGGREGATE what else is known.
                if (stage == 'convert') given += [technology: row.technology, source: row.source]
                if (stage == 'aggregate') given += [metadata: row.metadata]
                [stage, toJson(given + version)]
            } + [domains_annotate: toJson([metadata: row.metadata] + version)]
            def engine = image == 'cellpose' ? "cellpose${own.cellpose_generation}".toString() : image
            [method, [image: image, engine: engine, molecules: molecules, settings: settings, weights: weights(image)]]
        }
        def files = FILES.collectEntries { column -> [column, row.files[column] ?: []] }
        return [id: row.sample, parent: '', technology: row.technology, is_table: isTable] + files + [source: row.source, metadata: row.metadata] +
            [methods: methods, images: images, by_method: byMethod, exports: own.export ?: [], explorer: own.explorer as boolean, clusters: own.cluster as boolean,
             annotates: (own.annotate_markers || own.annotate_reference) as boolean, domains: own.domains, looks_at_image: own.domains_image_model as boolean] +
            byMethod[methods[0]].subMap(['settings', 'weights'])
    }

    /** The model's file or folder, where the parameter names one: relative to the sheet if it stands there, else to where the run started. */
    private static Object weights(String method, Map row, Map values, Path launchDir, Path sheetFolder, List<Map> errors) {
        def name = MODELS[method]
        def own = row.overrides.containsKey(name)
        def model = own ? row.overrides[name] : values[name]
        if (!name || model == SHIPPED_MODEL) return []
        def path = (own ? sheetFolder : launchDir).resolve(model).normalize()
        if (exists(path) && (method != 'cellpose' || Files.isRegularFile(path))) return path
        if (model.contains('/')) {
            def mistake = error('path-not-found', "sample \"${row.sample}\": ${name} not found: ${path}")
            if (!own) mistake = error('path-not-found', "${name} not found: ${path}")
            if (!errors.any { known -> known.message == mistake.message }) errors << mistake
        }
        return []
    }

    /** One line of JSON as Python's json.dumps with sorted keys writes it, safe between single quotes in a shell. */
    static String toJson(Object value) {
        if (value instanceof Map) return '{' + value.toSorted { a, b -> a.key <=> b.key }.collect { key, item -> "${toJson(key)}: ${toJson(item)}" }.join(', ') + '}'
        if (value instanceof Collection) return '[' + value.collect { item -> toJson(item) }.join(', ') + ']'
        if (!(value instanceof CharSequence)) return String.valueOf(value)
        return '"' + value.toString().collect { letter -> escaped(letter) }.join('') + '"'
    }

    private static String escaped(String letter) {
        def known = ['"': '\\"', '\\': '\\\\', '\n': '\\n', '\r': '\\r', '\t': '\\t', '\b': '\\b', '\f': '\\f'][letter]
        if (known) return known
        return letter < ' ' || letter > '\u007F' || letter == "'" ? String.format('\\u%04x', (int) (letter as char)) : letter
    }

    // ------------------------------------------------------------------------------------------------------------- mistakes

    private static class Mistake extends RuntimeException {

        final Map error

        Mistake(Map error) {
            super(error.message.toString())
            this.error = error
        }

    }

    private static Map error(Object code, Object message, Object hint = '') {
        return [code: code, message: message.toString(), hint: hint.toString()]
    }

    private static Object fail(Object code, Object message, Object hint = '') {
        throw new Mistake(error(code, message, hint))
    }

    /** Run `action`; a mistake goes to `errors`. Whether there was none. */
    private static boolean collectInto(List<Map> errors, String where = '', Closure action) {
        try {
            action()
            return true
        }
        catch (Mistake mistake) {
            errors << error(mistake.error.code, where + mistake.error.message, mistake.error.hint)
            return false
        }
    }

    /** As `errors.did_you_mean` in Python. */
    private static String didYouMean(String value, Collection<String> known) {
        def near = nearest(value, known, 0.6)
        return near ? "did you mean \"${near}\"?" : "known: ${known.toSorted().join(', ')}"
    }

    /** As the first of Python's difflib.get_close_matches. */
    private static String nearest(String word, Collection<String> known, double cutoff) {
        def best = known.collect { name -> [2.0d * matches(name, word) / Math.max(name.length() + word.length(), 1), name] }
            .findAll { found -> found[0] >= cutoff }
            .max { a, b -> a[0] <=> b[0] ?: a[1] <=> b[1] }
        return best ? best[1] : null
    }

    /** Characters in matching blocks after Ratcliff and Obershelp: the longest common part, then left and right of it. */
    private static int matches(String a, String b) {
        int size = 0, startA = 0, startB = 0
        def previous = new int[b.length() + 1]
        for (int i = 0; i < a.length(); i++) {
            def current = new int[b.length() + 1]
            for (int j = 0; j < b.length(); j++) {
                if (a.charAt(i) == b.charAt(j)) {
                    current[j + 1] = previous[j] + 1
                    if (current[j + 1] > size) {
                        size = current[j + 1]
                        startA = i - size + 1
                        startB = j - size + 1
                    }
                }
            }
            previous = current
        }
        if (size == 0) return 0
        return size + matches(a.substring(0, startA), b.substring(0, startB)) + matches(a.substring(startA + size), b.substring(startB + size))
    }

}
