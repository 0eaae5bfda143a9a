"""torch.compile is imported by those who compile, not by `import moerge_ext`."""

import subprocess
import sys

import pytest
import torch

from moerge_ext.routing.outside_graphs import keep_outside, outside_of_graphs


def test_importing_the_package_imports_no_compiler():
    code = "import sys, moerge_ext; print([name for name in ('torch._dynamo', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_outside_of_graphs_is_never_traced():
    traced = []

    @outside_of_graphs("the reason")
    def outside(x):
        traced.append(torch.compiler.is_compiling())
        return x + 1

    keep_outside()

    def inside(x):
        return outside(x * 2) * 3

    x = torch.ones(2)
    torch.testing.assert_close(torch.compile(inside, backend="eager")(x), torch.full((2,), 9.0))
    assert traced == [False]
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the reason"):
        torch.compile(inside, backend="eager", fullgraph=True)(x)
