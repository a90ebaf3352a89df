// One case, forward and backward, by the C++ kernels or by what FASTBN_SIMT_PTX names:
//   case NAME=VALUE...      see `settings` for the names
// Prints one line of JSON: the number of launches of each pass and the bytes of each result. With output=FILE the
// results go there, one after the other, as bytes.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>

#include "core/dispatch.h"
#include "cuda/backend.h"
#include "cuda/device.cuh"
#include "cuda/plan.h"

using namespace fastbn;

namespace {

std::map<std::string, std::string> settings = {
    {"N", "8"},        {"C", "16"},       {"S", "256"},  {"layout", "first"},  {"dtype", "bf16"},
    {"seed", "0"},     {"output", ""},    {"mask", "0"}, {"residual", "0"},    {"activation", "identity"},
    {"shared", "64"},  {"block", "48"},   {"mps", "4"},  {"cooperative", "1"}, {"cluster", "1"},
    {"training", "1"}, {"backward", "1"},
};

int64_t number(const char* name) { return std::atoll(settings.at(name).c_str()); }

template <class T>
T one_of(const char* name, const std::map<std::string, T>& values) {
  const auto found = values.find(settings.at(name));
  if (found == values.end()) throw std::invalid_argument(std::string(name) + " = " + settings.at(name));
  return found->second;
}

class Memory {
 public:
  explicit Memory(size_t bytes, int fill = 0xff) : bytes_(bytes) {
    if (posix_memalign(&data_, 4096, bytes + 4096) != 0) std::abort();
    std::memset(data_, fill, bytes);
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

using NameTensor = void(const char* name, const void* data, size_t bytes);

void run() {
  simt::config.seed = uint64_t(number("seed"));
  simt::config.multiprocessors = number("mps"), simt::config.cooperative = number("cooperative") != 0;
  simt::config.cluster = number("cluster");
  simt::config.shared_per_multiprocessor = number("shared") << 10;
  simt::config.shared_per_block = number("block") << 10;
  const auto layout = one_of<Layout>("layout", {{"first", Layout::channels_first}, {"last", Layout::channels_last}});
  const auto dtype =
      one_of<DType>("dtype", {{"f32", DType::f32}, {"f64", DType::f64}, {"f16", DType::f16}, {"bf16", DType::bf16}});
  const auto activation = one_of<Activation>("activation", {{"identity", Activation::identity},
                                                            {"relu", Activation::relu},
                                                            {"leaky_relu", Activation::leaky_relu},
                                                            {"relu6", Activation::relu6},
                                                            {"gelu", Activation::gelu}});
  const Problem problem{{number("N"), number("C"), number("S"), layout}, dtype};
  const int64_t C = problem.shape.C;
  const size_t count = size_t(problem.shape.elements()), bytes = count * size_t(size_of(dtype));
  const bool training = number("training") != 0;

  std::mt19937_64 engine(3);
  std::normal_distribution<double> normal;
  const auto fill = [&](const Memory& m, DType of, double mean, double width) {
    for (size_t i = 0; i < m.bytes() / size_t(size_of(of)); ++i) {
      write({m.data(), of}, int64_t(i), mean + width * normal(engine));
    }
  };
  Memory x(bytes), dy(bytes), residual(bytes), weight(size_t(C) * 4), bias(size_t(C) * 4), mean(size_t(C) * 4);
  fill(x, dtype, 1, 2), fill(dy, dtype, 0, 1), fill(residual, dtype, 0, 1);
  fill(weight, DType::f32, 1, 1), fill(bias, DType::f32, 0, 1), fill(mean, DType::f32, 1, 0.5);
  Memory counters(size_t(cuda::counter_bytes), 0);
  const size_t mask_bytes =
      number("mask") != 0
          ? size_t(cuda::make_plan(problem, cuda::Pass::forward, training, true, cuda::query_device()).mask_bytes)
          : 0;
  Memory y(bytes), moments(size_t(C) * 16), mask(mask_bytes, 0), dx(bytes), dr(bytes), dw(size_t(C) * 4),
      db(size_t(C) * 4);
  if (auto* const name = reinterpret_cast<NameTensor*>(simt::translated_symbol("ptx_name_tensor"))) {
    const std::pair<const char*, const Memory*> tensors[] = {
        {"x", &x}, {"dy", &dy}, {"residual", &residual}, {"y", &y}, {"dx", &dx}, {"dr", &dr}, {"mask", &mask}};
    for (const auto& [what, m] : tensors) name(what, m->data(), m->bytes());
  }

  unsigned* const barriers = static_cast<unsigned*>(counters.data());
  const cuda::Stream stream{nullptr, barriers, barriers + counters.bytes() / 2 / sizeof(unsigned)};
  Forward f{};
  f.problem = problem, f.input = x.data(), f.output = y.data(), f.moments = static_cast<double*>(moments.data());
  f.weight = {weight.data(), DType::f32}, f.bias = {bias.data(), DType::f32}, f.training = training, f.eps = 1e-5;
  f.mean = {mean.data(), DType::f32}, f.var = {weight.data(), DType::f32};
  if (!training) {
    for (int64_t i = 0; i < C; ++i) write({weight.data(), DType::f32}, i, 0.5 + std::abs(read(f.weight, i, 1)));
  }
  f.epilogue = {activation, 0.25, number("residual") != 0 ? residual.data() : nullptr};
  f.mask = mask_bytes > 0 ? mask.data() : nullptr;
  const cuda::Plan forward_plan = cuda::plan(f);
  const Memory forward_space(size_t(forward_plan.workspace_bytes) + 1);
  f.workspace = forward_space.data();
  cuda::forward(forward_plan, f, stream);
  const uint64_t forward_launches = simt::stats.launches, forward_blocks = simt::stats.blocks;

  Backward b{};
  b.problem = problem, b.grad_output = dy.data(), b.input = x.data(), b.grad_input = dx.data();
  b.weight = f.weight, b.bias = f.bias, b.moments = f.moments, b.grad_weight = {dw.data(), DType::f32};
  b.grad_bias = {db.data(), DType::f32}, b.training = training, b.eps = 1e-5;
  b.epilogue = f.epilogue, b.mask = f.mask;
  if (f.mask != nullptr) b.epilogue.residual = nullptr;
  if (f.epilogue.residual != nullptr && activation != Activation::identity) b.grad_residual = dr.data();
  if (number("backward") != 0) {
    const cuda::Plan backward_plan = cuda::plan(b);
    const Memory backward_space(size_t(backward_plan.workspace_bytes) + 1);
    b.workspace = backward_space.data();
    cuda::backward(backward_plan, b, stream);
  }

  FILE* const out = settings["output"].empty() ? nullptr : std::fopen(settings["output"].c_str(), "wb");
  std::cout << "{\"forward_launches\": " << forward_launches
            << ", \"backward_launches\": " << simt::stats.launches - forward_launches
            << ", \"forward_blocks\": " << forward_blocks << ", \"translated\": " << simt::stats.translated
            << ", \"results\": {";
  const char* comma = "";
  const std::pair<const char*, const Memory*> results[] = {
      {"y", &y}, {"moments", &moments}, {"mask", &mask}, {"dx", &dx}, {"dr", &dr}, {"dw", &dw}, {"db", &db}};
  for (const auto& [name, m] : results) {
    std::cout << comma << "\"" << name << "\": " << m->bytes(), comma = ", ";
    if (out != nullptr && std::fwrite(m->data(), 1, m->bytes(), out) != m->bytes()) throw std::runtime_error("disk");
  }
  std::cout << "}}" << std::endl;
  if (out != nullptr && std::fclose(out) != 0) throw std::runtime_error("disk");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (int i = 1; i < argc; ++i) {
      const std::string text = argv[i];
      const size_t at = text.find('=');
      if (at == std::string::npos || !settings.count(text.substr(0, at))) throw std::invalid_argument(text);
      settings[text.substr(0, at)] = text.substr(at + 1);
    }
    run();
  } catch (const std::exception& e) {
    std::cout << "FAILED: " << e.what() << std::endl;
    return 1;
  }
  return 0;
}
