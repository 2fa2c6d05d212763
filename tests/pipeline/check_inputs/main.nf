// Every case of tests/cases/bad_inputs.json through lib/Inputs.groovy, in one start of Nextflow:
// nextflow run tests/pipeline/check_inputs -lib lib --cases <cases with their folders> --repository . --output found.json
workflow {
    def cases = new groovy.json.JsonSlurper().parse(file(params.cases))
    def found = cases.collect { item ->
        def errors = []
        def slides = Inputs.examine(item.params, file(params.repository), file(item.folder), errors)
        def shown = slides.collect { slide -> slide + [path: slide.path.toString(), transcripts: slide.transcripts.toString(), weights: slide.weights.toString(), truth: '', prior_cells: ''] }
        [name: item.name, codes: errors.collect { mistake -> mistake.code }, lines: errors.collect { mistake -> Inputs.line(mistake) }, slides: shown]
    }
    file(params.output).text = groovy.json.JsonOutput.toJson(found)
}
