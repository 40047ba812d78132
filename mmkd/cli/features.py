"""`mmkd features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmkd.cli.common import Friendly, app, console


@app.command()
def features(
    items: Annotated[
        Path, typer.Argument(help="A .csv, .tsv or .parquet of items: item or item_id, and text columns.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME_feat.npy and NAME_ids.npy: that of the interactions.")],
    text: Annotated[str, typer.Option(help="Make text_feat.npy of this column.")] = "",
    images: Annotated[Path | None, typer.Option(help="Make image_feat.npy of ITEM.jpg, ITEM.png ... here.")] = None,
    text_model: Annotated[
        str, typer.Option(help="tfidf (built in), or a sentence-transformers model: name or folder (mmkd[text]).")
    ] = "tfidf",
    image_model: Annotated[
        str, typer.Option(help="An open_clip model, NAME/PRETRAINED; the latter may be a file (mmkd[image]).")
    ] = "ViT-B-32/laion2b_s34b_b79k",
    dim: Annotated[int, typer.Option(help="Width of tfidf vectors.", min=1)] = 256,
    block: Annotated[int, typer.Option(help="Items encoded and saved at once.", min=1)] = 64,
) -> None:
    """Make item features from a text column or from images. Stopped, it goes on where it was when called again."""
    with Friendly():
        from rich.progress import Progress

        from mmkd.data import encode

        if not text and images is None:
            raise ValueError("name a text column with --text, or a folder of images with --images")
        ids, texts = encode.read_texts(items, text or None)
        with Progress(console=console, transient=True) as bar:

            def report(what: str):
                task = bar.add_task(what, total=len(ids))
                return lambda done, total: bar.update(task, completed=done)

            written = []
            if text:
                written.append(
                    encode.text_features(
                        ids, texts, out, model=text_model, dim=dim, block=block, progress=report("text")
                    )
                )
            if images is not None:
                files = encode.image_files(images, ids)
                written.append(
                    encode.image_features(ids, files, out, model=image_model, block=block, progress=report("images"))
                )
        for path in written:
            typer.echo(f"{path}: {len(ids)} items")
