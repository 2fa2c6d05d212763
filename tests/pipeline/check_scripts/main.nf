// Two tasks, for the scripts that a scheduler would get.
process CPU {
    label 'process_medium'
    label 'env_core'
    memory '3 GB'
    time '2h'

    script:
    """
    true
    """
}

process GPU {
    label 'process_gpu'
    label 'env_cellpose3'
    memory '8 GB'
    time '4h'

    script:
    """
    true
    """
}

workflow {
    CPU()
    GPU()
}
