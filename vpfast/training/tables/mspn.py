"""Tables II to V and VII of the MSPN paper: Ling, Zhong, Li, "Predictive Coding Based Multiscale Network with
Encoder-Decoder LSTM for Video Prediction", arXiv 2212.11642. Numbers in brackets are the paper's references.
"""

from vpfast.training.tables.printed import Cell, Line, Part, Quantity, Table, columns, printed_rows

_PAPER = 'Ling, Zhong, Li, "Predictive Coding Based Multiscale Network with Encoder-Decoder LSTM", arXiv 2212.11642'

SSIM = Quantity("ssim", "SSIM ↑", 3)
PSNR = Quantity("psnr", "PSNR ↑", 2)
LPIPS_X100 = Quantity("lpips", "LPIPS x 100 ↓", 2, scale=100.0)

_RANGE_2 = (
    "SimVP's SSIM, and by their released code Conv-TT-LSTM's and LMC-Memory's, takes the range of pixels to be 2, "
    "which raises it; SimVP's PSNR is of 8-bit differences that wrap around, which raises it by many dB. See "
    "vpfast/metrics/README.md for both."
)

_KTH = "persons 17-25; frames 96x128 in the released code, the paper gives no size"


def _three(part: str, first: int = 1, last: int | None = None) -> tuple[Cell, ...]:
    return tuple(Cell(part, quantity, first, last) for quantity in (SSIM, PSNR, LPIPS_X100))


_TWENTY, _FORTY = _three("20"), _three("40")

TABLE_2 = Table(
    name="mspn-2",
    caption="KTH, means over the predicted frames",
    source=f"{_PAPER}, Table II",
    protocol="mspn",
    parts=(Part("20", "KTH", _KTH, 10, 20), Part("40", "KTH", _KTH, 10, 40)),
    labels=("Method",),
    columns=columns(("10 → 20", _TWENTY), ("10 → 40", _FORTY)),
    lines=(Line((), _TWENTY + _FORTY),),
    rows=printed_rows(
        """
        MCNet [10]        | 0.804 25.95 -      0.73  23.89 -
        fRNN [59]         | 0.771 26.12 -      0.678 23.77 -
        PredRNN [19]      | 0.839 27.55 -      0.703 24.16 -
        PredRNN++ [20]    | 0.865 28.47 -      0.741 25.21 -
        VarNet [56]       | 0.843 28.48 -      0.739 25.37 -
        SAVP-VAE [36]     | 0.852 27.77 8.36   0.811 26.18 11.33
        E3D-LSTM [38]     | 0.879 29.31 -      0.810 27.24 -
        STMF [37]         | 0.893 29.85 11.81  0.851 27.56 14.13
        Conv-TT-LSTM [18] | 0.907 28.36 13.34  0.882 26.11 19.12
        LMC-Memory [60]   | 0.894 28.61 13.33  0.879 27.50 15.98
        PPNet [61]        | 0.886 31.02 13.12  0.821 28.37 23.19
        VPTR [16]         | 0.879 26.96 8.61   -     -     -
        SimVP [62]        | 0.905 33.72 -      0.886 32.93 -
        TAU [14]          | 0.911 34.13 -      0.897 33.01 -
        MSPN (ours)       | 0.881 31.87 7.98   0.831 28.86 14.04
        """
    ),
    notes=(_RANGE_2,),
)

_MNIST_3 = (Cell("mnist", SSIM), Cell("mnist", Quantity("mse_sum", "MSE (pixel sum) ↓", 1)))

TABLE_3 = Table(
    name="mspn-3",
    caption="Moving MNIST, means over the 10 predicted frames",
    source=f"{_PAPER}, Table III",
    protocol="mspn",
    parts=(Part("mnist", "Moving MNIST", "the paper does not say which; frames 64x64, grey", 10, 10),),
    labels=("Method",),
    columns=columns(("10 → 10", _MNIST_3)),
    lines=(Line((), _MNIST_3),),
    rows=printed_rows(
        """
        PredRNN++ [20]    | 0.870 47.9
        E3D-LSTM [38]     | 0.910 41.3
        DDPAE [34]        | -     38.9
        Conv-TT-LSTM [18] | 0.915 53.0
        LMC-Memory [60]   | 0.924 41.5
        MAU [15]          | 0.937 27.6
        SimVP [62]        | 0.948 23.8
        CrevNet [63]      | 0.949 22.3
        TAU [14]          | 0.957 19.8
        PredRNN-V2 [64]   | 0.958 13.4
        MSPN (Ours)       | 0.963 12.9
        """
    ),
    notes=(
        "The paper heads its columns 10 → 20; its caption and its text say 10 predicted frames.",
        "The released test takes batches of 32 and divides a last one that is smaller by 32, too: of 10,000 clips the "
        "MSE comes out 0.2 % too small. Here every clip counts alike.",
        "Conv-TT-LSTM's released code prints a mean error times 1000 under MSE, not a pixel sum.",
    ),
)

_STEPS = (2, 4, 6, 8, 10)


def _by_step(quantity: Quantity) -> Line:
    return Line((quantity.heading,), tuple(Cell("human36m", quantity, step, step) for step in _STEPS))


TABLE_4 = Table(
    name="mspn-4",
    caption="Human3.6M, the predicted frames T = 2 to 10",
    source=f"{_PAPER}, Table IV",
    protocol="mspn",
    parts=(Part("human36m", "Human3.6M", "subject S11; frames cropped, then 128x128", 10, 10),),
    labels=("Method", "Metric"),
    columns=tuple(f"T = {step}" for step in _STEPS),
    lines=tuple(
        _by_step(quantity)
        for quantity in (
            Quantity("psnr", "PSNR ↑", 2),
            Quantity("ssim", "SSIM ↑", 4),
            Quantity("lpips", "LPIPS ↓", 4),
        )
    ),
    rows=printed_rows(
        """
        MCNet [10]   | PSNR ↑  | 30.0   26.55  24.94  23.90  22.83
        MCNet [10]   | SSIM ↑  | 0.9569 0.9355 0.9197 0.9030 0.8731
        MCNet [10]   | LPIPS ↓ | 0.0177 0.0284 0.0367 0.0462 0.0717
        fRNN [59]    | PSNR ↑  | 27.58  26.10  25.06  24.26  23.66
        fRNN [59]    | SSIM ↑  | 0.9000 0.8885 0.8799 0.8729 0.8675
        fRNN [59]    | LPIPS ↓ | 0.0515 0.0530 0.0540 0.0539 0.0542
        MAFENet [12] | PSNR ↑  | 31.36  28.38  26.61  25.47  24.61
        MAFENet [12] | SSIM ↑  | 0.9663 0.9528 0.9414 0.9326 0.9235
        MAFENet [12] | LPIPS ↓ | 0.0151 0.0219 0.0287 0.0339 0.0419
        MSPN (Ours)  | PSNR ↑  | 31.95  29.19  27.46  26.44  25.52
        MSPN (Ours)  | SSIM ↑  | 0.9687 0.9577 0.9478 0.9382 0.9293
        MSPN (Ours)  | LPIPS ↓ | 0.0146 0.0271 0.0384 0.0480 0.0571
        """,
        more_labels=1,
    ),
    notes=("T counts predicted frames. LPIPS is not multiplied by 100 here, as it is in the paper's other tables.",),
)

_ROADS = {
    "caltech": Part("caltech", "Caltech Pedestrian", "the paper does not say which sets; frames 128x160", 10, 10),
    "kitti": Part("kitti", "KITTI", "the paper does not say which drives; frames 128x160", 10, 10),
}
_HALVES = {
    f"{part.dataset} {first - 1}-{last}": _three(key, first, last)
    for key, part in _ROADS.items()
    for first, last in ((1, 5), (6, 10))
}

TABLE_5 = Table(
    name="mspn-5",
    caption="Caltech Pedestrian and KITTI, means over the predicted frames 1-5 and 6-10",
    source=f"{_PAPER}, Table V",
    protocol="mspn",
    parts=tuple(_ROADS.values()),
    labels=("Method",),
    columns=columns(*_HALVES.items()),
    lines=(Line((), tuple(cell for cells in _HALVES.values() for cell in cells)),),
    rows=printed_rows(
        """
        PredNet [41]    | 0.752 -     36.03  0.574 -     68.39  0.475 -     62.95  -     -     -
        MCNET [10]      | 0.705 -     37.34  0.488 -     52.92  0.555 -     37.39  -     -     -
        Voxel Flow [66] | 0.711 -     28.79  0.557 -     44.31  0.426 -     41.59  -     -     -
        Vid2vid [67]    | 0.751 -     20.14  0.587 -     33.96  -     -     -      -     -     -
        FVSOMP [65]     | 0.756 -     16.50  0.592 -     30.06  0.608 -     30.49  -     -     -
        MSPN (Ours)     | 0.818 23.88 10.98  0.682 19.87 19.56  0.629 19.44 32.10  0.447 15.69 46.52
        """
    ),
    notes=("The released code has KITTI at 128x256, cut from the middle; the paper says 128x160 of both data sets.",),
)

_STRATEGIES = (Part("kth", "KTH", _KTH, 10, 20), *_ROADS.values())

TABLE_7 = Table(
    name="mspn-7",
    caption="Training strategies of MSPN, means over the predicted frames",
    source=f"{_PAPER}, Table VII",
    protocol="mspn",
    parts=_STRATEGIES,
    labels=("Method", "Data set", "Adv.", "Long-term"),
    columns=columns(("", _three("kth"))),
    lines=tuple(Line((part.dataset,), _three(part.key)) for part in _STRATEGIES),
    rows=printed_rows(
        """
        MSPN (ours) | KTH                | yes | yes | 0.881 31.87 7.98
        MSPN (ours) | KTH                | no  | yes | 0.896 32.43 12.19
        MSPN (ours) | KTH                | no  | no  | 0.892 32.33 13.26
        MSPN (ours) | Caltech Pedestrian | yes | yes | 0.750 21.88 15.27
        MSPN (ours) | Caltech Pedestrian | no  | yes | 0.756 21.95 14.88
        MSPN (ours) | Caltech Pedestrian | no  | no  | 0.723 21.12 17.59
        MSPN (ours) | KITTI              | yes | yes | 0.538 17.57 39.31
        MSPN (ours) | KITTI              | no  | yes | 0.552 17.99 38.19
        MSPN (ours) | KITTI              | no  | no  | 0.495 15.77 40.01
        """,
        more_labels=3,
    ),
    notes=(
        "Adv.: trained against a discriminator. Long-term: predictions fed back in training.",
        "The paper's caption says 10 predicted frames and its heading 10 → 20. Its KTH rows are of 20: the first is "
        "Table II's. Those of Caltech and KITTI are of 10: the first ones are the means of Table V's halves.",
    ),
)

TABLES = (TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_7)
