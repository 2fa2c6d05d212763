include { CONVERT } from '../modules/convert'
include { TISSUE  } from '../modules/tissue'
include { PREVIEW } from '../modules/preview'

/*
 * A few windows of each slide, segmented with every combination of the parameters to try: one page of outlines a slide.
 */
workflow PREVIEW_SLIDES {
    take:
    slides_ch // [meta, machine's folder or image, transcript table or []]
    slides // id → [settings: stage → JSON of what the stage depends on, weights: file or [], …]

    main:
    raw_ch = CONVERT(
        slides_ch.map { meta, slide, transcripts -> [meta, slides[meta.id].settings.convert, slide, transcripts] }
    ).store // [meta, liver_1.raw.zarr]

    tissue_ch = TISSUE(
        raw_ch.map { meta, raw -> [meta, slides[meta.id].settings.tissue, raw] }
    ).store // [meta, liver_1.tissue.zarr]

    pages = PREVIEW(
        raw_ch.join(tissue_ch).map { meta, raw, tissue ->
            [meta, slides[meta.id].settings.preview, raw, tissue, slides[meta.id].weights]
        }
    ).page

    emit:
    pages // [meta, preview.html]
}
