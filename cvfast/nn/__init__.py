"""Drop-in layers: subclasses of torch.nn's, with the same parameters, state_dict, repr and isinstance."""

from cvfast.nn.conv import Conv2d, ConvTranspose2d

__all__ = ["Conv2d", "ConvTranspose2d"]
