// Runs cases from a file through the CUDA kernels on the CPU and writes what they left behind. The format is a flat list of
// 8-byte words; test_cuda_emulation.py writes and reads it.
#include <cstdio>
#include <fstream>
#include <iterator>

#include "../../csrc/cuda/combine_launch.cuh"
#include "../../csrc/cuda/gram_launch.cuh"
#include "../../csrc/cuda/weights.cuh"
#include "../../csrc/overlap.h"

using namespace gradproj;

struct Reader {
  std::vector<char> bytes;
  size_t at = 0;
  int64_t word() {
    int64_t value;
    std::memcpy(&value, &bytes[at], 8);
    at += 8;
    return value;
  }
  std::vector<int64_t> words(int64_t count) {
    std::vector<int64_t> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(word());
    return out;
  }
};

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ifstream in(argv[1], std::ios::binary);
  Reader r{{std::istreambuf_iterator<char>(in), {}}};
  std::ofstream out(argv[2], std::ios::binary);
  auto put = [&](const void* data, size_t bytes) { out.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes)); };

  for (int64_t cases = r.word(); cases > 0; --cases) {
    const std::vector<int64_t> head = r.words(9);
    int64_t operation = head[0];
    Layout layout;
    layout.rows = static_cast<int>(head[1]);  // with the base
    layout.base = head[2] != 0;
    layout.parts = static_cast<int>(head[3]);
    const int rows = layout.rows - layout.base;
    const cuda::Device device{nullptr, head[5], head[6] != 0};
    const Rule rule{static_cast<Method>(head[7]), 0.25, 0.0};
    const int64_t allocations = head[8];

    // Each storage of exactly its size, so that the sanitizer guards both ends.
    std::vector<std::unique_ptr<char[]>> storage;
    std::vector<int64_t> sizes;
    for (int64_t a = 0; a < allocations; ++a) {
      sizes.push_back(r.word());
      storage.push_back(std::make_unique<char[]>(static_cast<size_t>(sizes.back())));
      std::memcpy(storage.back().get(), &r.bytes[r.at], static_cast<size_t>(sizes.back()));
      r.at += static_cast<size_t>((sizes.back() + 7) / 8 * 8);
    }
    std::vector<std::vector<int64_t>> shapes;
    std::vector<Buffer> buffers;
    shapes.reserve(static_cast<size_t>(head[4]) * 2);
    for (int64_t b = 0; b < head[4]; ++b) {
      Buffer buffer;
      buffer.present = r.word() != 0;
      if (buffer.present) {
        buffer.dtype = static_cast<DType>(r.word());
        const int64_t allocation = r.word(), offset = r.word(), scale = r.word(), first = r.word();
        if (scale >= 0) buffer.scale = reinterpret_cast<const float*>(storage[static_cast<size_t>(scale)].get() + first);
        buffer.contiguous = r.word() != 0;
        buffer.ndim = static_cast<int32_t>(r.word());
        shapes.push_back(r.words(buffer.ndim));
        buffer.sizes = shapes.back().data();
        shapes.push_back(r.words(buffer.ndim));
        buffer.strides = shapes.back().data();
        buffer.data = storage[static_cast<size_t>(allocation)].get() + offset;
        buffer.numel = 1;
        for (int d = 0; d < buffer.ndim; ++d) buffer.numel *= buffer.sizes[d];
      }
      buffers.push_back(buffer);
    }
    for (int64_t i = r.word(); i > 0; --i) layout.part.push_back(static_cast<int32_t>(r.word()));
    auto doubles = [&](int64_t count) {
      std::vector<double> out;
      for (int64_t i = 0; i < count; ++i) out.push_back(std::bit_cast<double>(r.word()));
      return out;
    };
    std::vector<double> weights = doubles(int64_t{layout.parts} * rows);
    const std::vector<double> known = doubles(r.word());

    emulation::launches = 0;
    // Exactly as large as promised, and full of NaN: what is not written shows.
    std::vector<double> gram(static_cast<size_t>(layout.parts * rows * rows), std::nan(""));
    int64_t launches;
    try {
      if (operation == 5)  // a Gram of every part in buffer 1, their weights into buffer 0
        cuda::launch_weights(nullptr, rule, reinterpret_cast<const double*>(buffers[1].data), buffers[1].sizes[0],
                             static_cast<int>(buffers[1].sizes[1]),
                             const_cast<double*>(reinterpret_cast<const double*>(buffers[0].data)));
      const Plan plan = operation == 5 ? Plan{} : make_plan(buffers, layout);
      if (operation == 2 && plan.pieces.empty()) operation = 4;  // as csrc/cuda/ops.cu does: nothing to fuse
      std::vector<double> scratch(static_cast<size_t>(cuda::gram_scratch(device, plan)), std::nan(""));
      if (operation == 1 || operation == 2 || operation == 4) check_writable(buffers, layout.rows);
      if (operation == 0) cuda::launch_gram(device, plan, nullptr, scratch.data(), gram.data());
      if (operation == 1) cuda::launch_combine(device, plan, weights.data());
      if (operation == 2) cuda::launch_project_one(device, plan, rule, scratch.data(), gram.data(), weights.data());
      if (operation == 3) cuda::launch_gram(device, plan, known.data(), scratch.data(), gram.data());
      if (operation == 4) {
        cuda::launch_gram(device, plan, nullptr, scratch.data(), gram.data());
        cuda::launch_weights(nullptr, rule, gram.data(), layout.parts, rows, weights.data());
        cuda::launch_combine(device, plan, weights.data());
      }
      launches = emulation::launches;
    } catch (const PlanError& error) {
      std::fprintf(stderr, "%s\n", error.what());
      launches = -1 - emulation::launches;
    }
    put(&launches, 8);
    put(gram.data(), gram.size() * 8);
    put(weights.data(), weights.size() * 8);
    for (int64_t a = 0; a < allocations; ++a) put(storage[static_cast<size_t>(a)].get(), static_cast<size_t>(sizes[static_cast<size_t>(a)]));
  }
}
