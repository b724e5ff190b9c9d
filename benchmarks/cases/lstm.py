"""Shapes of lstm layers: T, B, I, H."""

from cvfast.testing.recurrent import layer_case

SHAPES = ((64, 1, 128, 128), (64, 8, 128, 256), (64, 32, 256, 256), (32, 16, 512, 512), (128, 64, 512, 512))


def case(steps: int, batch: int, inputs: int, hidden: int, **options):
    """A case named by its sizes."""
    name = f"{steps}-{batch}-{inputs}-{hidden}" + "".join(f"-{key}-{value}" for key, value in options.items())
    return layer_case("lstm", name, steps, batch, inputs, hidden, **options)


GROUPS = {
    "one-layer": [case(*shape) for shape in SHAPES],
    "bidirectional": [case(135, 2, 256, 256, bidirectional=True)],
    "three-layers": [case(16, 1, 40, 256, layers=3)],
}
