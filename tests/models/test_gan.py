"""Generators and discriminators: the paper's sizes, labels, and second gradients through the critic."""

import pytest
import torch

import cvfast
from cvfast.engine.recipes.gan import gradient_penalty
from cvfast.models import create_model
from cvfast.models.gan import DCGANDiscriminator, DCGANGenerator


def test_both_are_the_papers_network():
    """PyTorch's DCGAN example has 3,576,704 and 2,765,568 weights; here the outer layers have biases, too."""
    with torch.device("meta"):
        generator, discriminator = (create_model(f"dcgan_{x}", width=64) for x in ("generator", "discriminator"))
    assert sum(p.numel() for p in generator.parameters()) == 3_576_704 + 3
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_568 + 64 + 1


@pytest.mark.parametrize(("size", "channels", "classes"), [(28, 1, 10), (32, 3, 0), (64, 3, 2), (8, 1, 0)])
def test_images_have_the_size_asked_for_and_one_score_each(size, channels, classes):
    options = {"num_classes": classes, "in_chans": channels, "image_size": size, "width": 4}
    generator, discriminator = DCGANGenerator(latent=5, **options), DCGANDiscriminator(**options)
    labels = torch.arange(3) % classes if classes else None
    images = generator(torch.randn(3, 5), labels)
    assert images.shape == (3, channels, size, size) and images.abs().max() <= 1
    assert discriminator(images, labels).shape == (3,)


def test_labels_matter_and_are_neither_forgotten_nor_invented():
    options = {"in_chans": 1, "image_size": 28, "width": 4}
    generator, critic = DCGANGenerator(3, **options).eval(), DCGANDiscriminator(3, **options).eval()
    z = torch.randn(1, 100).expand(2, -1)
    images = generator(z, torch.tensor([0, 2]))
    assert not torch.equal(images[0], images[1])
    scores = critic(images[:1].expand(2, -1, -1, -1), torch.tensor([0, 2]))
    assert scores[0] != scores[1]
    for model, given in ((generator, z), (critic, images)):
        with pytest.raises(ValueError, match="labels must be given: 3 classes"):
            model(given)
    with pytest.raises(ValueError, match="labels must not be given"):
        DCGANGenerator(**options)(z, torch.tensor([0, 1]))


def test_samples_are_a_function_of_the_random_numbers():
    generator = DCGANGenerator(in_chans=1, image_size=8, width=4, latent=6).eval()
    first, again = (generator.sample(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, generator.sample(3, torch.Generator().manual_seed(6)))


@pytest.mark.parametrize("size", [0, 7, 30, 37, 36])
def test_sizes_that_do_not_double_are_refused(size):
    for network in (DCGANGenerator, DCGANDiscriminator):
        with pytest.raises(ValueError, match=f"power of two from 2 on, got {size}"):
            network(image_size=size)


def test_other_settings_are_refused():
    with pytest.raises(ValueError, match="unknown norm 'instance'"):
        DCGANDiscriminator(norm="instance")
    with pytest.raises(ValueError, match="num_classes must not be negative, got -1"):
        DCGANDiscriminator(-1)
    with pytest.raises(ValueError, match="positive"):
        DCGANGenerator(latent=0)


def test_the_penalty_of_a_linear_critic_is_known():
    weight = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    real, fake = torch.randn(6, 2, 1, 1), torch.randn(6, 2, 1, 1)
    penalty = gradient_penalty(
        lambda images, labels: (images * weight).sum((1, 2, 3)), real, fake, None, torch.Generator().manual_seed(0)
    )
    assert penalty.item() == pytest.approx((5 - 1) ** 2)


def penalty_gradients(critic, real, fake):
    penalty = gradient_penalty(critic, real, fake, None, torch.Generator().manual_seed(0))
    return torch.autograd.grad(penalty, list(critic.parameters()), allow_unused=True)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_the_penaltys_gradient_goes_twice_through_cvfasts_convolutions(norm):
    """Against float64 on torch's operators; and cvfast's own float64 against finite differences."""
    torch.manual_seed(0)
    critic = DCGANDiscriminator(in_chans=2, image_size=16, width=8, norm=norm)
    for parameter in critic.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    real, fake = torch.randn(4, 2, 16, 16), torch.randn(4, 2, 16, 16)
    ours = penalty_gradients(critic, real, fake)
    critic, real, fake = critic.double(), real.double(), fake.double()
    with cvfast.use_backend("native"):
        exact = penalty_gradients(critic, real, fake)
    assert [g is None for g in ours] == [g is None for g in exact]  # the last bias has no part in it
    used = [(a, b) for a, b in zip(ours, exact, strict=True) if a is not None and b.norm() > 0]
    assert len(used) >= 3
    for a, b in used:
        assert (a - b).norm() <= 1e-5 * b.norm()

    weight = critic.layers[0].weight
    direction = torch.randn_like(weight)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
        values.append(gradient_penalty(critic, real, fake, None, torch.Generator().manual_seed(0)).item())
        with torch.no_grad():
            weight -= step * direction
    slope = (values[0] - values[1]) / 2e-5
    assert (penalty_gradients(critic, real, fake)[0] * direction).sum().item() == pytest.approx(slope, rel=1e-5)
