// Cases of lib/Resources.groovy and lib/Disk.groovy, in one start of Nextflow:
// nextflow run tests/pipeline/check_resources -lib lib --cases cases.json --repository . --output found.json
workflow {
    def cases = new groovy.json.JsonSlurper().parse(file(params.cases))
    def root = file(params.repository)
    def table = new groovy.json.JsonSlurper().parseText(root.resolve('assets/resources.json').text)
    def asked = cases.tasks.collect { item ->
        def sizes = Resources.sizes(item.inputs.collect { path -> file(path) })
        [sizes: sizes, memory_mb: Resources.memoryMb(table, item.process, item.memory_mb, sizes, item.attempt), minutes: Resources.minutes(table, item.process, sizes, item.attempt)]
    }
    def work = file(cases.work)
    cases.empty.each { path -> Disk.empty(file(path), work) }
    def found = [
        tasks: asked,
        shortage: cases.shortage.collect { item -> Disk.shortage(item.read, item.cleanup, ['work folder', item.work], ['results', item.results], item.same) },
        read: cases.read.collect { item -> Disk.readBytes(item + [path: file(item.path)]) },
        names: cases.names.collect { name -> Resources.name(table, [process: name]) },
        ours: cases.ours.collect { path -> Disk.isOurs(file(path), work) },
        request: Resources.request(cases.params, root, file('.').toAbsolutePath()),
    ]
    file(params.output).text = groovy.json.JsonOutput.toJson(found)
}
