include { DOMAINS_PREPARE } from '../modules/domains_prepare'
include { DOMAINS_TRAIN   } from '../modules/domains_train'
include { DOMAINS_EMBED   } from '../modules/domains_embed'
include { DOMAINS_ASSIGN  } from '../modules/domains_assign'

/*
 * Spatial domains that all slides share. A slide that fails on the way, or in which there is nothing to find domains from,
 * is left out; the others go on.
 */
workflow DOMAINS {
    take:
    tables_ch // [[id: 'liver_1'], liver_1.table.zarr, or a table of cells that was made elsewhere, liver_1.raw.zarr or []]
    slides // id → [is_table: …, looks_at_image: …, he_image: file or [], domains_model: folder or [], settings: …]
    mode // 'zeroshot', 'train' or 'finetune'

    main:
    // What concerns all slides is the same for each.
    def cohort = slides.values().first()

    DOMAINS_PREPARE(
        tables_ch.map { meta, table, raw ->
            def slide = slides[meta.id]
            def image = slide.looks_at_image ? [raw, slide.he_image, slide.he_matrix, slide.domains_image_weights] : [[], [], [], []]
            [meta, slide.settings.domains_prepare, table, !slide.is_table] + image
        }
    )
    graphs_ch = DOMAINS_PREPARE.out.graph // [meta, liver_1.graph.zarr]

    // A model as it is (none: the shipped one), or one made of all slides, in the order of their names.
    model_ch = mode == 'zeroshot'
        ? channel.value(cohort.domains_model)
        : DOMAINS_TRAIN(cohort.settings.domains_train, in_order(graphs_ch), cohort.domains_model).model

    DOMAINS_EMBED(graphs_ch.map { meta, graph -> [meta, cohort.settings.domains_embed, graph] }, model_ch)
    DOMAINS_ASSIGN(cohort.settings.domains_assign, in_order(DOMAINS_EMBED.out.latents), model_ch)

    domains = DOMAINS_ASSIGN.out.domains
        .flatten()
        .map { file -> [[id: file.name - '.domains.parquet'], file] }
        .join(graphs_ch)
        .mix(DOMAINS_PREPARE.out.refusal.map { meta, refusal -> [meta, refusal, []] })

    about = DOMAINS_ASSIGN.out.about
    model = DOMAINS_ASSIGN.out.model

    emit:
    domains // [meta, liver_1.domains.parquet or why it has none (JSON), liver_1.graph.zarr or []]
    about // domains.json
    model // with the prototypes that were used
}

/** The files of all slides in the order of the slides' names; nothing if there are none. */
def in_order(files_ch) {
    return files_ch
        .toSortedList { a, b -> a[0].id <=> b[0].id }
        .filter { files -> files }
        .map { files -> files.collect { found -> found[1] } }
}
