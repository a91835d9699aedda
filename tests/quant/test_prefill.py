"""Attention of several tokens over the latent cache on a GPU, in small shapes, against float64.

Without a CUDA device the kernels are interpreted.
"""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("interpreter")
pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from slotmoe.quant.backends import pick_backend
from tests.quant.test_triton import DEVICE, attention, error, make_weight, randn

def test_x():
    ops = pick_backend(DEVICE, "triton")
    for T,S,H in ((17,17,5),(64,300,2),(70,70,3),(2,1000,4)):
        q = randn(T,H,48)*3; rows = torch.full((S+40,48), torch.nan, dtype=torch.float16); rows[:S]=randn(S,48)
        y = ops.mla(q, rows[:S], 40, 0.2)
        print(T,S,H,error(y, attention(q, rows[:S], 40, 0.2)))
        for kind in ("int8", torch.bfloat16, torch.float32):
            N,V = 24, 37
            w = make_weight(kind, H*(N+V), 40)
            from slotmoe.quant.weights import dequantize
            d = dequantize(w).double().view(H,N+V,40)
            q = randn(T,H,N+8)[...,:N]
            a = ops.absorb_query(q, w); b = ops.absorb_value(y, w, N)
            print(kind, error(a, torch.einsum('thn,hnr->thr', q.double(), d[:,:N])), error(b, torch.einsum('thr,hvr->thv', y.double(), d[:,N:])))
