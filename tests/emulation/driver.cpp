// Runs cases from a file through the CUDA kernels on the CPU and writes what they left behind. The format is a flat
// list of 8-byte words; tests/cuda_emulation.py writes and reads it.
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "../../csrc/cuda/combine.cu"
#include "../../csrc/cuda/gram.cu"
#include "../../csrc/cuda/project.cu"
#include "../../csrc/cuda/weights.cu"
#include "../../csrc/overlap.h"

using namespace gradproj;

enum Operation : int64_t { kGram, kCombine, kProject, kWeights };

class Reader {
 public:
  explicit Reader(const char* path) {
    std::ifstream in(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(in), {});
  }
  int64_t word() { return value<int64_t>(); }
  std::vector<int64_t> words(int64_t count) { return values<int64_t>(count); }
  std::vector<double> doubles() { return values<double>(word()); }
  // A copy of exactly the size that comes first, so that a sanitizer guards both ends.
  std::vector<char> block() {
    const size_t size = static_cast<size_t>(word());
    std::vector<char> out(&bytes_[at_], &bytes_[at_] + size);
    out.shrink_to_fit();
    at_ += (size + 7) / 8 * 8;
    return out;
  }

 private:
  template <typename T>
  T value() {
    T out;
    std::memcpy(&out, &bytes_[at_], 8);
    at_ += 8;
    return out;
  }
  template <typename T>
  std::vector<T> values(int64_t count) {
    std::vector<T> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(value<T>());
    return out;
  }
  std::vector<char> bytes_;
  size_t at_ = 0;
};

struct Case {
  Operation operation;
  cuda::Device device;
  Rule rule;
  Layout layout;
  std::vector<std::vector<char>> storage;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<Buffer> buffers;
  std::vector<double> weights, gram_dd, gram;

  explicit Case(Reader& in) {
    operation = static_cast<Operation>(in.word());
    layout.rows = in.word();
    layout.parts = static_cast<int>(in.word());
    device = {nullptr, in.word(), false};
    rule = {static_cast<Method>(in.word()), 0.25, 0.0};
    for (int64_t count = in.word(); count > 0; --count) storage.push_back(in.block());
    const int64_t count = in.word();
    shapes.reserve(static_cast<size_t>(2 * count));
    for (int64_t b = 0; b < count; ++b) buffers.push_back(read_buffer(in));
    layout.part = in.words(in.word());
    weights = in.doubles();
    gram_dd = in.doubles();
    gram.assign(layout.parts * layout.rows * layout.rows, std::nan(""));  // what is not written shows
  }

  void run() {
    if (operation == kWeights) {  // of the Grams in buffer 1 into buffer 0
      const Buffer &out = buffers[0], &grams = buffers[1];
      double* weights = reinterpret_cast<double*>(const_cast<char*>(out.data));
      return cuda::launch_weights(device, rule, reinterpret_cast<const double*>(grams.data), grams.sizes[0],
                                  static_cast<int>(grams.sizes[1]), weights);
    }
    const Plan plan = make_plan(buffers, layout);
    if (operation == kCombine || operation == kProject) check_writable(buffers, layout.rows);
    std::vector<double> scratch(static_cast<size_t>(cuda::gram_scratch(device, plan)), std::nan(""));
    const double* known = gram_dd.empty() ? nullptr : gram_dd.data();
    if (operation == kGram) cuda::launch_gram(device, plan, known, scratch.data(), gram.data());
    if (operation == kCombine) cuda::launch_combine(device, plan, {weights.data()});
    if (operation == kProject)
      cuda::launch_project(device, plan, rule, known, scratch.data(), gram.data(), weights.data());
  }

 private:
  Buffer read_buffer(Reader& in) {
    Buffer buffer;
    buffer.present = in.word() != 0;
    if (!buffer.present) return buffer;
    buffer.dtype = static_cast<DType>(in.word());
    const int64_t allocation = in.word(), offset = in.word();
    buffer.contiguous = in.word() != 0;
    buffer.ndim = static_cast<int32_t>(in.word());
    shapes.push_back(in.words(buffer.ndim));
    buffer.sizes = shapes.back().data();
    shapes.push_back(in.words(buffer.ndim));
    buffer.strides = shapes.back().data();
    buffer.data = storage[static_cast<size_t>(allocation)].data() + offset;
    buffer.numel = 1;
    for (int d = 0; d < buffer.ndim; ++d) buffer.numel *= buffer.sizes[d];
    return buffer;
  }
};

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Reader in(argv[1]);
  std::ofstream out(argv[2], std::ios::binary);
  auto put = [&](const void* data, size_t bytes) {
    out.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  };
  for (int64_t cases = in.word(); cases > 0; --cases) {
    Case c(in);
    emulation::launches = 0;
    int64_t launches;
    try {
      c.run();
      launches = emulation::launches;
    } catch (const PlanError& error) {
      std::fprintf(stderr, "%s\n", error.what());
      launches = -1 - emulation::launches;
    }
    put(&launches, 8);
    put(c.gram.data(), c.gram.size() * 8);
    put(c.weights.data(), c.weights.size() * 8);
    for (const std::vector<char>& storage : c.storage) put(storage.data(), storage.size());
  }
}
