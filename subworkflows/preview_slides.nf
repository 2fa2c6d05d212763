include { CONVERT                     } from '../modules/convert'
include { TISSUE                      } from '../modules/tissue'
include { PREVIEW                     } from '../modules/preview'

/*
 * A few windows of each slide, segmented with every combination of the parameters to try: one page of outlines a slide.
 */
workflow PREVIEW_SLIDES {
    take:
    slides_ch // [meta, machine's folder or image, transcript table or []]
    settings // id → stage → JSON of the settings that the stage depends on

    main:
    raw_ch = CONVERT(slides_ch.map { meta, slide, transcripts -> [meta, settings[meta.id].convert, slide, transcripts] }).store // [meta, liver_1.raw.zarr]
    tissue_ch = TISSUE(raw_ch.map { meta, raw -> [meta, settings[meta.id].tissue, raw] }).store // [meta, liver_1.tissue.zarr]
    pages = PREVIEW(raw_ch.join(tissue_ch).map { meta, raw, tissue -> [meta, settings[meta.id].preview, raw, tissue] }).page

    emit:
    pages // [meta, preview.html]
}
