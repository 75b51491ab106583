"""Recurrent layers: LSTM, GRU and RNN, as modules, as cells, and by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, conv, lin, pattern

T, D = 9, 5


def recurrent(layer: nn.Module, width: int, **parts: Any) -> Net:
    """Return an embedding of 6, the layer, and a head over all steps."""
    return Net(
        lambda m, x: m.z(m.r(m.a(x))[0]),
        shape=(T, D),
        a=lin(D, 6),
        r=layer,
        z=lin(width, 4),
        **parts,
    )


@pattern("a r.weight_ih_l0 r.weight_hh_l0[1]")
def lstm() -> Net:
    return recurrent(nn.LSTM(6, 8, batch_first=True), 8)


@pattern("a r.weight_ih_l0 r.weight_hh_l0[1]")
def lstm_without_bias() -> Net:
    return recurrent(nn.LSTM(6, 8, batch_first=True, bias=False), 8)


@pattern("a r.weight_hh_l0[1] r.weight_hh_l1[1] r.weight_ih_l1[1]")
def lstm_stacked() -> Net:
    return recurrent(nn.LSTM(6, 8, num_layers=2, batch_first=True, dropout=0.1), 8)


@pattern("a r.weight_hh_l0[1] r.weight_hh_l0_reverse[1]")
def lstm_bidirectional() -> Net:
    return recurrent(nn.LSTM(6, 8, bidirectional=True, batch_first=True), 16)


@pattern("a r.weight_hh_l0[1] r.weight_hh_l1_reverse[1]")
def lstm_stacked_bidirectional() -> Net:
    return recurrent(nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True), 16)


@pattern("a r.weight_hr_l0", kept="r.weight_ih_l0", why="hidden size")
def lstm_projected() -> Net:
    return recurrent(nn.LSTM(6, 8, proj_size=5, batch_first=True), 5)


@pattern("a r.weight_hr_l0 r.weight_hr_l1_reverse", kept="r.weight_ih_l0", why="hidden size")
def lstm_projected_stacked_bidirectional() -> Net:
    layer = nn.LSTM(6, 8, num_layers=2, proj_size=5, bidirectional=True, batch_first=True)
    return recurrent(layer, 10)


@pattern("a r.weight_hh_l0[1]")
def lstm_sequence_first() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        out, _ = m.r(m.a(x).permute(1, 0, 2))
        return m.z(out[-1])

    return Net(run, shape=(T, D), a=lin(D, 6), r=nn.LSTM(6, 8), z=lin(8, 4))


@pattern("a r.weight_hh_l0[1]")
def lstm_last_hidden_state() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        _, (h, c) = m.r(m.a(x))
        return m.z(h[-1] + torch.tanh(c[0]))

    return Net(run, shape=(T, D), a=lin(D, 6), r=nn.LSTM(6, 8, batch_first=True), z=lin(8, 4))


@pattern("a r.weight_hh_l0[1]")
def lstm_hidden_states_of_both_directions() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        _, (h, _) = m.r(m.a(x))
        return m.z(torch.cat([h[-2], h[-1]], dim=-1))

    layer = nn.LSTM(6, 8, batch_first=True, bidirectional=True)
    return Net(run, shape=(T, D), a=lin(D, 6), r=layer, z=lin(16, 4))


@pattern("a r.weight_hh_l0[1] h c")
def lstm_with_initial_state() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        state = (m.h(y[:, 0]).unsqueeze(0), m.c(y[:, 0]).unsqueeze(0))
        return m.z(m.r(y, state)[0])

    layer = nn.LSTM(6, 8, batch_first=True)
    return Net(run, shape=(T, D), a=lin(D, 6), r=layer, h=lin(6, 8), c=lin(6, 8), z=lin(8, 4))


@pattern("a r.weight_hh_l0[1]")
def lstm_with_zero_state() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        h = torch.zeros(2, x.size(0), 8)
        return m.z(m.r(m.a(x), (h, h))[0][:, -1, :])

    layer = nn.LSTM(6, 8, num_layers=2, batch_first=True)
    return Net(run, shape=(T, D), a=lin(D, 6), r=layer, z=lin(8, 4))


@pattern("a r.weight_hh_l0[1]")
def gru() -> Net:
    return recurrent(nn.GRU(6, 8, batch_first=True), 8)


@pattern("a r.weight_hh_l0[1] r.weight_hh_l1_reverse[1]")
def gru_stacked_bidirectional() -> Net:
    return recurrent(nn.GRU(6, 8, 2, batch_first=True, bidirectional=True), 16)


@pattern("a r.weight_hh_l0[1] h")
def gru_with_initial_state() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(m.r(y, torch.tanh(m.h(y.mean(1))).unsqueeze(0))[1][0])

    layer = nn.GRU(6, 8, batch_first=True)
    return Net(run, shape=(T, D), a=lin(D, 6), r=layer, h=lin(6, 8), z=lin(8, 4))


@pattern("a r.weight_hh_l0[1]")
def rnn_tanh() -> Net:
    return recurrent(nn.RNN(6, 8, batch_first=True), 8)


@pattern("a r.weight_hh_l0[1] r.weight_hh_l1_reverse[1]")
def rnn_relu_stacked_bidirectional() -> Net:
    layer = nn.RNN(6, 8, 2, nonlinearity="relu", bidirectional=True, batch_first=True)
    return recurrent(layer, 16)


@pattern("a r.weight_hh_l0[1] s.weight_hh_l0[1]")
def two_lstms_with_a_linear_between() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.mid(F.relu(m.r(m.a(x))[0]))
        return m.z(m.s(y)[0].sum(1))

    return Net(
        run,
        shape=(T, D),
        a=lin(D, 6),
        r=nn.LSTM(6, 8, batch_first=True),
        mid=lin(8, 7),
        s=nn.LSTM(7, 10, batch_first=True),
        z=lin(10, 4),
    )


@pattern("a r.weight_hh_l0[1]")
def residual_around_lstm() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(y + m.r(y)[0])

    return Net(run, shape=(T, D), a=lin(D, 6), r=nn.LSTM(6, 6, batch_first=True), z=lin(6, 4))


@pattern("a r.weight_hh_l0[1]")
def convolution_then_lstm_then_attention() -> Net:
    """Speech: a map becomes a sequence, whose features are channels by rows."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).relu()
        b, c, h, w = y.shape
        y = y.permute(0, 3, 1, 2).reshape(b, w, c * h)
        y = m.r(y)[0]
        return m.z((y * m.s(y).softmax(1)).sum(1))

    layer = nn.GRU(36, 8, batch_first=True)
    return Net(run, a=conv(3, 6), r=layer, s=lin(8, 1), z=lin(8, 4))


@pattern("a cell.weight_ih cell.weight_hh[1]")
def lstm_cell_unrolled() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h = c = torch.zeros(x.shape[0], 8)
        for t in range(4):
            h, c = m.cell(y[:, t], (h, c))
        return m.z(h)

    return Net(run, shape=(T, D), a=lin(D, 6), cell=nn.LSTMCell(6, 8), z=lin(8, 4))


@pattern("a cell.weight_hh[1]")
def gru_cell_unrolled() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h = m.h(y[:, 0])
        outs = []
        for t in range(4):
            h = m.cell(y[:, t], h)
            outs.append(h)
        return m.z(torch.stack(outs, 1))

    return Net(run, shape=(T, D), a=lin(D, 6), h=lin(6, 8), cell=nn.GRUCell(6, 8), z=lin(8, 4))


@pattern("a cell.weight_hh[1]")
def rnn_cell_unrolled() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h = None
        for t in range(4):
            h = m.cell(y[:, t], h)
        return m.z(h)

    return Net(run, shape=(T, D), a=lin(D, 6), cell=nn.RNNCell(6, 8), z=lin(8, 4))


@pattern("a w u")
def lstm_by_hand() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h = c = torch.zeros(x.shape[0], 8)
        for t in range(3):
            i, f, g, o = (m.w(y[:, t]) + m.u(h)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return m.z(h)

    return Net(run, shape=(T, D), a=lin(D, 6), w=lin(6, 32), u=lin(8, 32, bias=False), z=lin(8, 4))


@pattern("a gates")
def convolutional_lstm() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h = c = torch.zeros(x.shape[0], 8, 6, 5)
        for _ in range(2):
            i, f, g, o = torch.split(m.gates(torch.cat([y, h], dim=1)), 8, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return m.z(h)

    return Net(run, a=conv(3, 6), gates=conv(14, 32, 3), z=conv(8, 4))


@pattern("a zr q")
def convolutional_gru() -> Net:
    """RAFT's update: gates from the state and the input side by side."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h = torch.tanh(m.h(x))
        for _ in range(2):
            hx = torch.cat([h, y], dim=1)
            z, r = torch.sigmoid(m.zr(hx)).chunk(2, 1)
            h = (1 - z) * h + z * torch.tanh(m.q(torch.cat([r * h, y], dim=1)))
        return m.z(h)

    return Net(run, a=conv(3, 6), h=conv(3, 8), zr=conv(14, 16, 3), q=conv(14, 8, 3), z=conv(8, 4))
