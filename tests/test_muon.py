import pytest
import torch

from ldm.config import OptimConfig
from ldm.training.muon import RMS, Muon, orthogonalized
from ldm.training.optim import build_optimizer, lookup_tables

from .table import table


@table("shape", [(8, 40), (40, 8), (16, 16)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1, 1e-3, 1e3]).view(3, 1, 1)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalized(matrices)
    inside = u.mT @ result @ vh.mT  # diagonal, if the singular vectors are those of the matrix
    values = inside.diagonal(dim1=1, dim2=2)
    assert torch.allclose(inside, torch.diag_embed(values), atol=1e-4)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25


def test_adamw_groups_step_as_torchs_adamw():
    torch.manual_seed(0)
    start, target = torch.randn(5), torch.randn(5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    optimizers = Muon([{"params": [ours]}], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(10):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = parameter.detach() - target
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_weights_of_one_shape_step_as_each_would_alone():
    torch.manual_seed(0)
    shapes = [(8, 4), (8, 4), (8, 2, 2), (4, 8), (8, 4)]
    together, alone = ([torch.nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    for ours, theirs in zip(together, alone, strict=True):
        theirs.data.copy_(ours.data)
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizers = [
        Muon([{"params": some, "orthogonal": True}], **settings) for some in (together, *([p] for p in alone))
    ]
    for _ in range(3):
        for ours, theirs in zip(together, alone, strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        together[1].grad = alone[1].grad = None
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_orthogonal_update_has_the_size_of_an_adamw_update():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(32, 16, 3, 3))
    weight.grad = torch.randn_like(weight) * 1e-4  # its scale does not matter
    Muon([{"params": [weight], "orthogonal": True}], lr=0.01).step()
    size = float(weight.detach().square().mean().sqrt()) / 0.01
    assert size == pytest.approx(RMS, rel=0.2)  # exact if all singular values were 1


def test_a_linear_problem_is_solved():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    x, solution = torch.randn(64, 4), torch.randn(6, 4)
    optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=0.1)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 500)
        optimizer.zero_grad()
        (x @ (weight - solution).T).square().mean().backward()
        optimizer.step()
    assert float((weight.detach() - solution).abs().max()) < 0.02


def test_every_weight_but_embeddings_norms_and_biases_is_orthogonalised():
    module = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = build_optimizer(module.parameters(), OptimConfig(optimizer="muon"), lookup_tables(module))
    orthogonal, others = optimizer.param_groups
    assert orthogonal["params"] == [module[1].weight]
    assert orthogonal["orthogonal"]
    assert not others["orthogonal"]
    assert {id(p) for p in others["params"]} == {id(p) for p in module.parameters() if p is not module[1].weight}
