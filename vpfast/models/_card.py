"""The model card that goes with a saved model: README.md, Markdown below a YAML head that the Hub reads."""

import dataclasses
import json
from string import Template
from typing import Any

from torch import nn

from vpfast._version import __version__

_TEMPLATE = Template("""\
---
library_name: vpfast
${license}tags:
- video-prediction
- $tag
---

# $title

$about

| | |
|---|---|
| model | `$kind` of vpfast $version |
| parameters | $parameters, $dtype |
| frames | $colours, height and width multiples of $multiple, values in [0, 1] |

## Use

```python
import torch
from vpfast.models import $kind

model = $kind.from_pretrained("$name")
frames = torch.rand($shape)  # (B, T, C, H, W), of a video
$use
```

$sections## Configuration

```json
$config
```
""")

_SHRVQVAE = (
    "*S-HR-VQVAE: Sequential Hierarchical Residual Learning Vector Quantized Variational Autoencoder for Video "
    "Prediction*, Adiban et al."
)
_ABOUT = {
    "MSPN": (
        "Predicts the next frames of a video. The network: *Predictive Coding Based Multiscale Network "
        "with Encoder-Decoder LSTM for Video Prediction*, Ling et al."
    ),
    "HRVQVAE": f"Turns frames of a video into layers of integers, their codes, and back. The network: {_SHRVQVAE}",
    "SHRVQVAE": f"Predicts the next frames of a video: encodes frames, predicts codes, decodes them. {_SHRVQVAE}",
}
_PREDICT = "future = model.predict(frames, horizon=10)  # the next 10 frames"
_CODE = "codes = model.encode(frames)\nagain = model.decode(codes)"


def model_card(
    model: nn.Module, name: str, license: str = "", about: str = "", training: str = "", quality: str = ""
) -> str:
    """The card of ``model``.

    Args:
        model: of :mod:`vpfast.models`.
        name: what ``from_pretrained`` is to be given; the end of it is the title.
        license: an identifier of the Hub, such as ``"mit"``.
        about, training, quality: paragraphs in Markdown: what it is for, how it was trained, how well it does.
    """
    config: Any = model.config
    kind, weights = type(model).__name__, [*model.parameters()]
    side = 8 * config.multiple
    sections = {"Training": training, "Quality": quality}
    return _TEMPLATE.substitute(
        license=f"license: {license}\n" if license else "",
        tag=kind.lower(),
        title=name.rstrip("/").rpartition("/")[2],
        about="\n\n".join(filter(None, (about.strip(), _ABOUT[kind]))),
        kind=kind,
        version=__version__,
        parameters=f"{sum(weight.numel() for weight in weights):,}",
        dtype=str(weights[0].dtype).removeprefix("torch."),
        colours={1: "grey", 3: "RGB"}.get(config.in_channels, f"{config.in_channels} channels"),
        multiple=config.multiple,
        name=name,
        shape=f"1, 10, {config.in_channels}, {side}, {side}",
        use=_CODE if kind == "HRVQVAE" else _PREDICT,
        sections="".join(f"## {title}\n\n{text.strip()}\n\n" for title, text in sections.items() if text.strip()),
        config=json.dumps(dataclasses.asdict(config), indent=2),
    )
