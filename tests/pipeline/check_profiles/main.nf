// The configuration of many calls, in one start of Nextflow:
// nextflow run tests/pipeline/check_profiles --calls calls.json --repository . --output found.json
// Values that a task decides are called with what a task would know.
def plain(value, params) {
    if (value instanceof Closure) {
        value.resolveStrategy = Closure.DELEGATE_FIRST
        value.delegate = [
            params: params,
            task: [attempt: 1, cpus: 2, memory: nextflow.util.MemoryUnit.of('8 GB'), time: nextflow.util.Duration.of('4h'), exitStatus: 50001],
        ]
        try {
            return plain(value.call(), params)
        }
        catch (Exception wrong) {
            return "undecided: ${wrong.message}".toString()
        }
    }
    if (value instanceof Map) return value.collectEntries { key, item -> [key.toString(), plain(item, params)] }
    if (value instanceof Collection) return value.collect { item -> plain(item, params) }
    return value == null || value instanceof Number || value instanceof Boolean ? value : value.toString()
}

workflow {
    def calls = new groovy.json.JsonSlurper().parse(file(params.calls))
    def found = calls.collect { call ->
        def run = new nextflow.cli.CmdRun(profile: call.profile, params: call.params)
        try {
            def config = new nextflow.config.ConfigBuilder()
                .setOptions(new nextflow.cli.CliOptions())
                .setCmdRun(run)
                .setBaseDir(file(params.repository))
                .build()
            plain(config, config.params)
        }
        catch (Exception wrong) {
            [error: wrong.message]
        }
    }
    file(params.output).text = groovy.json.JsonOutput.toJson(found)
}
