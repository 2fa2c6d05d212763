// Every case of tests/cases/bad_inputs.json through lib/Inputs.groovy, in one start of Nextflow:
// nextflow run tests/pipeline/check_inputs -lib lib --cases <cases with their folders> --repository . --output found.json
// Paths as text, at any depth.
def plain(value) {
    if (value instanceof Map) return value.collectEntries { key, item -> [key, plain(item)] }
    if (value instanceof Collection) return value.collect { item -> plain(item) }
    return value instanceof java.nio.file.Path ? value.toString() : value
}

workflow {
    def cases = new groovy.json.JsonSlurper().parse(file(params.cases))
    def found = cases.collect { item ->
        def errors = []
        def slides = Inputs.examine(item.params, file(params.repository), file(item.folder), errors)
        def shown = slides.collect { slide -> plain(slide) }
        [name: item.name, codes: errors.collect { mistake -> mistake.code }, lines: errors.collect { mistake -> Inputs.line(mistake) }, slides: shown]
    }
    file(params.output).text = groovy.json.JsonOutput.toJson(found)
}
