include { CONVERT                     } from '../modules/convert'
include { TISSUE                      } from '../modules/tissue'
include { PREVIEW                     } from '../modules/preview'
include { PREVIEW as PREVIEW_STARDIST } from '../modules/preview'

/*
 * A few windows of each slide, segmented with every combination of the parameters to try: one page of outlines a slide.
 */
workflow PREVIEW_SLIDES {
    take:
    slides_ch // [meta, machine's folder or image, transcript table or [], prior cells or [], regions or []]
    slides // id → [settings: stage → JSON of what the stage depends on, weights: file or [], …]

    main:
    raw_ch = CONVERT(
        slides_ch.map { meta, slide, transcripts, prior, regions ->
            [meta, slides[meta.id].settings.convert, slide, transcripts, prior, regions, slides[meta.id].fullres_image]
        }
    ).store // [meta, liver_1.raw.zarr]

    tissue_ch = TISSUE(
        raw_ch.map { meta, raw -> [meta, slides[meta.id].settings.tissue, raw] }
    ).store // [meta, liver_1.tissue.zarr]

    // [meta, settings, liver_1.raw.zarr, liver_1.tissue.zarr, weights], by the environment that has the method's engine
    to_try_ch = raw_ch
        .join(tissue_ch)
        .map { meta, raw, tissue -> [meta, slides[meta.id].settings.preview, raw, tissue, slides[meta.id].weights] }
        .branch { meta, _settings, _raw, _tissue, _weights ->
            stardist: slides[meta.id].methods[0].tokenize('+')[0] == 'stardist'
            others: true
        }
    pages = PREVIEW(to_try_ch.others).page.mix(PREVIEW_STARDIST(to_try_ch.stardist).page)

    emit:
    pages // [meta, preview.html]
}
