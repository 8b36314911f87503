"""Small networks and loops that several tests share."""

from functools import partial

import torch
from torch import Tensor, nn

from srlora_pl.lowrank import Adaptation, LoRA, PiSSA, SRLoRA


class Block(nn.Module):
    """A transformer block's linears without the attention: enough to carry every kind of adapted matrix."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj(torch.tanh(q * k) + v)
        return x + self.fc2(torch.tanh(self.fc1(x)))


class ToyNet(nn.Module):
    def __init__(self, dim: int = 12, hidden: int = 20, depth: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(5, dim)
        self.blocks = nn.ModuleList(Block(dim, hidden) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def toy_net(seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: int) -> ToyNet:
    torch.manual_seed(seed)
    return ToyNet(**kwargs).to(dtype)


def toy_batches(count: int, seed: int = 1, dtype: torch.dtype = torch.float32, size: int = 8) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 5, generator=generator, dtype=dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def full_rank_losses(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss of each sample whose gradients have full rank, where cross entropy's of a `ToyNet` have not.

    The inputs of its blocks span their 12 dimensions, and the loss sees all outputs.
    """
    x = torch.sin(5 * net.embed(batch[0].to(net.embed.weight.dtype)))
    for block in net.blocks:
        x = block(x)
    return torch.sin(3 * x).sum(-1)


def train(net: nn.Module, adaptation, optimizer, batches, first_step: int = 0) -> None:
    """A plain PyTorch loop over ``batches``, as a user without Lightning writes it."""
    for step, (x, y) in enumerate(batches, start=first_step + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        adaptation.before_optimizer(step)
        optimizer.step()
        adaptation.after_optimizer(step, optimizer)


def one_step(net: nn.Module, adaptation: Adaptation) -> None:
    """Show ``adaptation`` the gradients of one batch; no optimizer."""
    x, y = toy_batches(1)[0]
    nn.functional.cross_entropy(net(x), y).backward()
    adaptation.before_optimizer(1)
    net.zero_grad()


def optimizer_of(net: nn.Module, kind=torch.optim.AdamW, **options) -> torch.optim.Optimizer:
    return kind([p for p in net.parameters() if p.requires_grad], **{"lr": 0.01, **options})


def srlora(**options) -> SRLoRA:
    return SRLoRA(**{"rank": 4, "alpha": 8.0, "target_rank": 12, **options})


METHODS = {"lora": LoRA(rank=4, alpha=8.0), "pissa": PiSSA(rank=4, alpha=8.0), "srlora": srlora()}


def begun(method, steps=40, dtype=torch.float32, optimizer=torch.optim.AdamW, **options):
    """A network, its adaptation and its optimizer, before the first of so many steps."""
    net = toy_net(dtype=dtype)
    adaptation = Adaptation(net, method)
    adaptation.start()
    adaptation.plan(steps)
    return net, adaptation, optimizer_of(net, optimizer, **options)


def finished(method, steps=40, dtype=torch.float32, **options):
    """Those of `begun`, after all of the steps."""
    run = begun(method, steps, dtype, **options)
    train(*run, toy_batches(steps, dtype=dtype))
    return run


# Rounding of one layer's products, a few dozen terms each.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}
SRLORA = partial(SRLoRA, rank=2, alpha=5.0)


def trained(method, steps=8, dtype=torch.float32, optimizer=torch.optim.AdamW, pretrained=None, **options):
    """A trained adaptation, and the network as it was before."""
    net, before = toy_net(dtype=dtype, **options), toy_net(dtype=dtype, **options)
    adaptation = Adaptation(net, method, trainable=["head"], pretrained=pretrained)
    adaptation.start()
    adaptation.plan(steps)
    train(net, adaptation, optimizer_of(net, optimizer, lr=0.02), toy_batches(steps, dtype=dtype))
    return adaptation, before


def changes(adaptation, before):
    """W_eff - W0 by layer, float64."""
    return {
        name: layer.merged_weight().double() - before.get_parameter(f"{name}.weight").detach().double()
        for name, layer in adaptation.layers.items()
        if layer.matrices(name)
    }


def assert_same_state(net: nn.Module, other: nn.Module) -> None:
    """To the bit."""
    for (name, value), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, theirs), name
