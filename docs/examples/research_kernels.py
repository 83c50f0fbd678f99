"""The kernels on lists of tensors: what a projection did, and a rule of one's own from the Gram matrix to weights."""

import torch

import gradproj


def main():
    torch.manual_seed(0)
    shapes = [(64, 32), (64,), (8, 3, 3, 3)]
    g, d1, d2 = ([torch.randn(shape) for shape in shapes] for _ in range(3))
    g[1] = None  # no gradient there: products run over the rest

    G = gradproj.gram(g, d1, d2)
    print("Gram matrix, float64:\n", G)

    mine = [None if t is None else t.clone() for t in g]
    info = gradproj.project_(mine, d1, d2, method="conflict")
    print(f"{info.backend}: weights {info.weights.tolist()}, part removed {info.removed.item():.3f}")

    def half_of_what_conflicts(gram):  # [K + 1, K + 1] -> [K + 1], on the device
        weights = -0.5 * (gram[0, 1:] / gram.diagonal()[1:]).clamp(max=0)
        return torch.cat([weights.new_ones(1), weights])

    info = gradproj.project_(g, d1, d2, method=half_of_what_conflicts)
    print("by a rule of one's own:", info.weights.tolist())

    # W keeps its products with the columns of U, whatever has happened to it since B was taken.
    W, U = torch.randn(64, 32), torch.linalg.qr(torch.randn(32, 4)).Q
    B = W @ U
    W += 0.1 * torch.randn_like(W)
    moved = gradproj.pin_([W], [U], [B])
    print(f"pin: had moved by {moved.item():.3f}, now by {(W @ U - B).norm():.1e}")


if __name__ == "__main__":
    main()
