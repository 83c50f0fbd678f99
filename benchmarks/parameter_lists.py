"""Shapes of real models, as lists: what a projection walks."""

Shapes = list[tuple[int, ...]]


def gpt2_124m_linear() -> Shapes:
    """[outputs, inputs] of its linear layers, 48 of 124M's 148 tensors, 85 million elements."""
    return [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12


def gpt2_124m() -> Shapes:
    """GPT-2 small, 148 tensors, 124.4 million elements."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *(block * 12), (768,), (768,)]


def decoder_1b() -> Shapes:
    """A 16-layer decoder with grouped queries and a gated MLP, 146 tensors, 1.24 billion elements."""
    block = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    block += [(8192, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)]
    return [(128256, 2048), *(block * 16), (2048,)]


def decoder_1b_linear() -> Shapes:
    """[outputs, inputs] of its linear layers, 112 of 146 tensors, 0.97 billion elements."""
    return [shape for shape in decoder_1b()[1:] if len(shape) == 2]


def llama_7b_linear() -> Shapes:
    """[outputs, inputs] of three of LLaMA-7B's 32 blocks, 0.61 billion elements."""
    return ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 3


def qwen3_30b_linear() -> Shapes:
    """[outputs, inputs] of one of Qwen3-30B-A3B's 48 blocks: attention and 128 experts, 0.62 billion elements."""
    attention = [(4096, 2048), (512, 2048), (512, 2048), (2048, 4096)]
    return attention + [(768, 2048), (768, 2048), (2048, 768)] * 128


def small_net() -> Shapes:
    """300 tensors of a narrow residual network, 1.5 million elements."""
    return [(64, 64, 3, 3) if i % 5 == 0 and i < 200 else (64,) for i in range(300)]


def decoder_35m() -> Shapes:
    """A 6-layer decoder, 50 tensors, 35.7 million elements: 143 MB in float32, between what caches hold and a large
    model."""
    block = [(512,), (1536, 512), (512, 512), (512,), (2048, 512), (512, 2048), (2048,), (512,)]
    return [(32768, 512), *(block * 6), (512,)]


def ten_million() -> Shapes:
    """10 million elements: two rows of it in float32 are 80 MB, in bfloat16 40 MB."""
    return [(1000, 500)] * 20


def uniform(count: int, size: int) -> Shapes:
    return [(size,)] * count
