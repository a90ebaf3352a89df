// In: a number of seeds, and optionally a word that names of cases must contain. Out: status 0 if the CUDA kernels,
// executed on the CPU, gave what a float64 reference gives for every case, read and wrote the bytes of their plan, and
// every kind of plan was reached; otherwise a message about the first case that did not. Without torch and Python.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <set>
#include <sstream>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/device.cuh"
#include "cuda/plan.h"

using namespace fastbn;
using cuda::Pass, cuda::Plan, cuda::Strategy, cuda::AccessPattern;

namespace {

// ---- random numbers: what is tested is a function of the seed ------------------------------------------------------

uint64_t state = 1;
uint64_t random_bits() {
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return state * 0x2545f4914f6cdd1d >> 11;
}
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }
double uniform() { return double(random_bits()) * 0x1p-53; }
// Variance 1, and never further than 3 from 0, so that no first value of a channel is an outlier.
double noise() { return 2 * (uniform() + uniform() + uniform()) - 3; }

// ---- tensors -------------------------------------------------------------------------------------------------------

// On the heap, and ends with it, so that ASan sees what reads or writes too far.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t count, bool misaligned = false) : dtype_(dtype), count_(count) {
    const size_t offset = misaligned ? size_t(size_of(dtype)) : 0, bytes = size_t(count * size_of(dtype));
    memory_.reset(new char[offset + bytes]);
    data_ = memory_.get() + offset;
    std::memset(data_, 0xff, bytes);  // NaN
  }
  void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  size_t bytes() const { return size_t(count_ * size_of(dtype_)); }
  Param param() const { return {data_, dtype_}; }
  Output output() const { return {data_, dtype_}; }
  double get(int64_t i) const { return read({data_, dtype_}, i, NAN); }
  void set(int64_t i, double value) { write({data_, dtype_}, i, value); }

 private:
  DType dtype_ = DType::f32;
  int64_t count_ = 0;
  std::unique_ptr<char[]> memory_;
  char* data_ = nullptr;
};

// Scratch memory, with a margin around it that shows what was written beside it; ASan sees that by itself.
class Scratch {
 public:
  Scratch(int64_t bytes, int fill) : bytes_(size_t(bytes)) {
    if (posix_memalign(&memory_, 256, bytes_ + 2 * margin) != 0) std::abort();
    std::memset(memory_, 0x5a, bytes_ + 2 * margin);
    std::memset(data(), fill, bytes_);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  void* data() const { return static_cast<char*>(memory_) + margin; }
  bool margins_hold() const {
    const char *before = static_cast<const char*>(memory_), *after = before + margin + bytes_;
    const auto holds = [](char c) { return c == 0x5a; };
    return std::all_of(before, before + margin, holds) && std::all_of(after, after + margin, holds);
  }

 private:
  static constexpr size_t margin = SIMT_ASAN ? 0 : 16 << 10;
  size_t bytes_;
  void* memory_ = nullptr;
};

double epsilon(DType dtype) {
  return dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

// ---- cases ---------------------------------------------------------------------------------------------------------

struct Gpu {
  const char* name;
  int64_t multiprocessors, shared_per_multiprocessor, shared_per_block;
  bool cooperative;
};
constexpr Gpu gpus[] = {
    {"small", 4, 64 << 10, 48 << 10, true},    // groups of several blocks, several waves
    {"roomy", 6, 200 << 10, 160 << 10, true},  // a channel tile fits in a block
    {"alone", 4, 64 << 10, 48 << 10, false},   // no cooperative launches
    {"poor", 2, 24 << 10, 22 << 10, true},     // little fits
};

struct Case {
  std::string name;
  Problem problem;
  bool misaligned, odd_values;
};

std::string doing, epilogue_name;  // the case and the plan in work

[[noreturn]] void wrong(const Case& c, const std::string& text) {
  throw std::runtime_error(c.name + ": " + text + "\nwith " + doing);
}

int64_t index_of(const Shape& shape, int64_t n, int64_t channel, int64_t s) {
  return shape.layout == Layout::channels_first ? (n * shape.C + channel) * shape.S + s
                                                : (n * shape.S + s) * shape.C + channel;
}

// The least number of a type, where it is one that results may come near.
double least_of(DType dtype) { return dtype == DType::f16 ? 0x1p-24 : 0; }

// What a result of some size becomes in half precision.
double fitting(DType dtype, double want) { return dtype == DType::f16 && std::abs(want) > 65500 ? INFINITY : want; }

// |got - want| <= relative * (|want| + scale); where no number is due, any infinity or NaN will do.
void expect(const Case& c, const char* what, int64_t i, double got, double want, double relative, double scale = 0,
            double slack = 0) {
  const double allowed = relative * (std::abs(want) + scale + slack) + slack;
  if (std::isfinite(want) ? std::abs(got - want) <= allowed : !std::isfinite(got)) return;
  std::ostringstream text;
  text.precision(17);
  text << what << "[" << i << "] is " << got << ", should be " << want;
  wrong(c, text.str());
}

// Rounding to the type of the result, and sums in float (double for double): measured errors are below half of it.
double tolerance(DType of_result, DType of_values) {
  return epsilon(of_result) + (of_values == DType::f64 ? 1e-13 : 4e-6);
}

// What was reached, for example "resident rows forward, several blocks, several waves".
std::map<std::string, int> reached;

// The kernels are templates of these; empty: of batch norm alone.
std::string kernel_of(const Plan& plan, DType dtype, const Epilogue& e, const void* mask, const void* grad_residual,
                      Pass pass) {
  const bool forward = pass == Pass::forward, narrow = plan.vector == 1 || dtype == DType::f64;
  if (mask != nullptr && !forward) return ", masked";
  if (e.activation == Activation::identity && (forward ? e.residual : grad_residual) == nullptr) return "";
  if (narrow || e.activation != Activation::relu) return ", any";
  if (e.residual == nullptr && grad_residual == nullptr) return ", relu";
  return forward ? ", relu of a sum" : ", any";
}

std::vector<std::string> names_of(const Plan& plan, Pass pass, bool training, const std::string& kernel = "") {
  std::string base = plan.strategy == Strategy::resident ? "resident" : training ? "streaming" : "streaming eval";
  base += plan.pattern == AccessPattern::rows ? " rows" : " columns";
  base += pass == Pass::forward ? " forward" : " backward";
  std::vector<std::string> names = {base + (plan.batch_splits > 1 ? ", several blocks" : ", one block")};
  if (plan.strategy == Strategy::resident && plan.waves > 1) names.push_back(base + ", several waves");
  if (plan.vector == 1) names.push_back(base + ", scalar");
  if (!kernel.empty()) names.push_back(base + kernel);
  return names;
}

std::set<std::string> all_names() {
  std::set<std::string> names;
  for (const AccessPattern pattern : {AccessPattern::rows, AccessPattern::columns}) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      for (const int64_t blocks : {1, 2}) {
        Plan plan{};
        plan.pattern = pattern, plan.batch_splits = blocks, plan.waves = 2, plan.vector = 4;
        plan.strategy = Strategy::resident;
        for (const char* kernel : {", relu", pass == Pass::forward ? ", relu of a sum" : ", masked", ", any"}) {
          for (const auto& name : names_of(plan, pass, true, kernel)) names.insert(name);
        }
        plan.strategy = Strategy::streaming, plan.vector = 1;
        for (const bool training : {false, true}) {
          if (pass == Pass::forward && !training) continue;  // the same kernel as in training
          for (const auto& name : names_of(plan, pass, training)) names.insert(name);
        }
      }
    }
  }
  return names;
}

std::unique_ptr<Scratch> counters;

// One call of the backend: launches, bytes, barrier counters.
template <class Body>
void call(const Case& c, const Plan& plan, Pass pass, bool training, const std::string& kernel, const Body& body) {
  for (const auto& name : names_of(plan, pass, training, kernel)) ++reached[name];
  doing = c.name + epilogue_name + ", " + names_of(plan, pass, training)[0] + kernel + ": " +
          std::to_string(plan.channel_tiles) + " tiles of " + std::to_string(plan.channels_per_tile) + " channels, " +
          std::to_string(plan.batch_splits) + " blocks a tile, " + std::to_string(plan.waves) + " waves, " +
          std::to_string(plan.vector) + " elements an access, " + std::to_string(plan.shared_bytes) + " bytes shared";
  simt::stats = {};
  body(cuda::Stream{nullptr, static_cast<unsigned*>(counters->data())});
  if (plan.strategy == Strategy::resident && simt::stats.launches != 1) {
    wrong(c, std::to_string(simt::stats.launches) + " launches of the resident strategy");
  }
  // Those of barriers, in the first half, may have their top bit set: it flips with each barrier.
  constexpr size_t count = cuda::counter_bytes / sizeof(unsigned);
  for (size_t i = 0; i < count; ++i) {
    const unsigned n = static_cast<unsigned*>(counters->data())[i];
    if (n == 0 || (n == 0x80000000u && i < count / 2)) continue;
    wrong(c, "counter " + std::to_string(i) + " is " + std::to_string(n) + " after the launch");
  }
}

void written_once(const Case& c, const char* what, const simt::Watch& watch) {
  for (size_t i = 0; i < watch.writes.size(); ++i) {
    if (watch.writes[i] == 1 && watch.reads[i] == 0) continue;
    wrong(c, std::string(what) + " byte " + std::to_string(i) + " was written " + std::to_string(watch.writes[i]) +
                 " times and read " + std::to_string(watch.reads[i]) + " times");
  }
}

// Every byte `least` times, and not more often but for `spare` bytes: the first value of a channel, as pivot.
void was_read(const Case& c, const char* what, const simt::Watch& watch, int64_t least, int64_t spare) {
  int64_t more = 0;
  for (size_t i = 0; i < watch.reads.size(); ++i) {
    more += watch.reads[i] - least;
    if (watch.writes[i] == 0 && watch.reads[i] >= least) continue;
    wrong(c, std::string(what) + " byte " + std::to_string(i) + " was read " + std::to_string(watch.reads[i]) +
                 " times, not " + std::to_string(least) + ", and written " + std::to_string(watch.writes[i]) +
                 " times");
  }
  if (more > spare)
    wrong(c, std::string(what) + " was read more often than planned, by bytes: " + std::to_string(more));
}

// ---- forward and backward of one case ------------------------------------------------------------------------------

Tensor random_tensor(const Case& c, double base) {
  const Shape& shape = c.problem.shape;
  Tensor t(c.problem.dtype, shape.elements(), c.misaligned);
  for (int64_t channel = 0; channel < shape.C; ++channel) {
    const double center = base * double(channel % 7 - 3), width = 0.5 + double(channel % 3);
    for (int64_t n = 0; n < shape.N; ++n) {
      for (int64_t s = 0; s < shape.S; ++s) t.set(index_of(shape, n, channel, s), center + width * noise());
    }
  }
  return t;
}

Tensor random_param(const Case& c, int64_t kind) {
  if (kind == 0) return {};
  Tensor t(kind == 1 ? DType::f32 : c.problem.dtype, c.problem.shape.C);
  for (int64_t i = 0; i < t.count(); ++i) t.set(i, i == 1 ? 0 : noise());
  return t;
}

std::vector<double> values_of(const Tensor& t, const Shape& shape, int64_t channel) {
  std::vector<double> values;
  for (int64_t n = 0; n < shape.N; ++n) {
    for (int64_t s = 0; s < shape.S; ++s) values.push_back(t.get(index_of(shape, n, channel, s)));
  }
  return values;
}

struct Statistics {
  double mean, var;
};
// In long double: sums of double in turn are worse than the kernels'.
Statistics statistics_of(const std::vector<double>& values) {
  long double sum = 0, squares = 0;
  for (double v : values) sum += v;
  const long double n = values.size(), mean = sum / n;
  for (double v : values) squares += (v - mean) * (v - mean);
  return {double(mean), double(squares / n)};
}

// ---- what follows the normalization --------------------------------------------------------------------------------

struct EpilogueCase {
  const char* name;
  Activation activation;
  double param;
  bool adds, mask;
};
// Each as often as the others, so that every kernel is met soon.
constexpr EpilogueCase epilogues[] = {
    {"relu", Activation::relu, 0, false, false},
    {"relu, mask", Activation::relu, 0, false, true},
    {"add relu", Activation::relu, 0, true, false},
    {"add relu, mask", Activation::relu, 0, true, true},
    {"leaky_relu", Activation::leaky_relu, 0.25, false, false},
    {"add leaky_relu, mask", Activation::leaky_relu, 0.25, true, true},
    {"relu6, mask", Activation::relu6, 0, false, true},
    {"add", Activation::identity, 0, true, false},
    {"relu", Activation::relu, 0, false, false},
    {"elu", Activation::elu, 0.75, false, false},
    {"add relu, mask", Activation::relu, 0, true, true},
    {"add silu", Activation::silu, 0, true, false},
    {"relu6", Activation::relu6, 0, false, false},
    {"add relu", Activation::relu, 0, true, false},
    {"hardswish", Activation::hardswish, 0, false, false},
    {"gelu", Activation::gelu, 0, false, false},
    {"add gelu", Activation::gelu, 0, true, false},
    {"sigmoid", Activation::sigmoid, 0, false, false},
    {"add tanh", Activation::tanh, 0, true, false},
};

double act(const EpilogueCase& e, double z) {
  const double six = z + 3 < 0 ? 0 : z + 3 > 6 ? 6 : z + 3;
  switch (e.activation) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::leaky_relu:
      return z > 0 ? z : z * e.param;
    case Activation::relu6:
      return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::elu:
      return z > 0 ? z : e.param * std::expm1(z);
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::hardswish:
      return z * six / 6;
    case Activation::gelu:
      return z * std::erfc(-z / std::sqrt(2)) / 2;
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-z));
    case Activation::tanh:
      return std::tanh(z);
    default:
      return z;
  }
}

struct Slope {
  double value;
  double slack;  // what it may be off by, because z is near where the slope jumps
};

// error: of z. y: what the forward pass made of it, which tells on what side of a jump it was; in float16 only where it
// did not become zero, and in few digits only where it did not become six.
Slope slope(const EpilogueCase& e, double z, double y, double error, DType dtype) {
  const auto near = [&](double at) { return std::abs(z - at) <= error; };
  const bool lost = y == 0 && dtype == DType::f16 && near(0);
  const double sigma = 1 / (1 + std::exp(-z));
  switch (e.activation) {
    case Activation::relu:
      return {y == 0 ? 0.0 : 1.0, lost ? 1.0 : 0.0};
    case Activation::leaky_relu:
      return {y <= 0 ? e.param : 1.0, lost ? 1 - e.param : 0.0};
    case Activation::relu6:
      if (y == 6 && size_of(dtype) == 2 && std::abs(z - 6) <= error + 12 * epsilon(dtype)) return {0, 1};
      return {y == 0 || y == 6 ? 0.0 : 1.0, lost ? 1.0 : 0.0};
    case Activation::elu:
      return {z > 0 ? 1 : e.param * std::exp(z), near(0) ? 1 - e.param : 0};
    case Activation::silu:
      return {sigma * (1 + z * (1 - sigma)), 0};
    case Activation::hardswish:
      return {z < -3 ? 0 : z <= 3 ? z / 3 + 0.5 : 1, near(-3) || near(3) ? 0.5 : 0};
    case Activation::gelu:
      return {std::erfc(-z / std::sqrt(2)) / 2 + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI), 0};
    case Activation::sigmoid:
      return {sigma * (1 - sigma), 0};
    case Activation::tanh:
      return {1 - std::tanh(z) * std::tanh(z), 0};
    default:
      return {1, 0};
  }
}

// Values of few kinds, and a bias that makes z of one of them zero but for roundings: whether it is above is decided by
// the operations it is made of. given_mean: in eval.
void put_on_edge(const Case& c, Tensor& x, const Tensor& weight, Tensor& bias, Tensor& residual,
                 const Tensor* given_mean, const Tensor* given_var, double eps) {
  const Shape& shape = c.problem.shape;
  bias = Tensor(DType::f32, shape.C);
  for (int64_t i = 0; i < shape.C; ++i) {
    std::vector<double> values = values_of(x, shape, i);
    for (double& v : values) v = std::round(v * 2) / 2;
    const Statistics st =
        given_mean == nullptr ? statistics_of(values) : Statistics{given_mean->get(i), given_var->get(i)};
    const double at = values[0];
    const double zero = (at - st.mean) / std::sqrt(st.var + eps) * read(weight.param(), i, 1);
    bias.set(i, std::isfinite(zero) ? -zero : 0);
    for (int64_t k = 0; k < shape.per_channel(); ++k) {
      const int64_t place = index_of(shape, k / shape.S, i, k % shape.S);
      x.set(place, values[size_t(k)]);
      if (residual.data() != nullptr && values[size_t(k)] == at) residual.set(place, 0);
    }
  }
}

// chosen == nullptr: batch norm alone.
void test_case(const Case& c, const EpilogueCase* chosen) {
  const Shape& shape = c.problem.shape;
  const DType dtype = c.problem.dtype;
  const int64_t C = shape.C, count = shape.per_channel();
  const double eps = 1e-5, momentum = 0.25;
  const bool training = count > 1 && below(4) != 0;
  const double tol = tolerance(dtype, dtype);

  Tensor x = random_tensor(c, dtype == DType::bf16 ? 1 : 4);
  if (c.odd_values) {  // a constant channel, and one that must keep its NaN or infinity to itself
    for (int64_t i = 0; i < count; ++i) x.set(index_of(shape, i / shape.S, 0, i % shape.S), 96);
    x.set(index_of(shape, below(shape.N), C - 1, below(shape.S)), below(2) ? NAN : INFINITY);
  }
  const Tensor weight = random_param(c, below(3));
  Tensor bias = random_param(c, below(3));
  Tensor mean = random_param(c, 1 + below(2)), var = random_param(c, 1 + below(2));
  for (int64_t i = 0; i < C; ++i) var.set(i, 0.5 + uniform());
  const auto given = [&](int64_t i) { return Statistics{mean.get(i), var.get(i)}; };

  epilogue_name = chosen == nullptr ? "" : std::string(" ") + chosen->name + (training ? "" : " eval");
  const EpilogueCase e = chosen == nullptr ? EpilogueCase{"", Activation::identity, 0, false, false} : *chosen;
  const Case apart{c.name, c.problem, c.misaligned || (e.adds && !e.mask && below(8) == 0), false};
  Tensor residual = e.adds ? random_tensor(apart, 0.5) : Tensor();
  const bool aligned = !c.misaligned && !apart.misaligned;
  const bool on_edge = chosen != nullptr && below(2);
  if (on_edge) put_on_edge(c, x, weight, bias, residual, training ? nullptr : &mean, &var, eps);

  // ---- forward
  Tensor y(dtype, shape.elements(), c.misaligned), moments(DType::f64, 2 * C);
  Tensor running_mean = random_param(c, 1 + below(2)), running_var = random_param(c, 1 + below(2));
  std::vector<double> old_mean, old_var;
  for (int64_t i = 0; i < C; ++i) old_mean.push_back(running_mean.get(i)), old_var.push_back(running_var.get(i));
  const int64_t batches = 4;
  const bool cumulative = below(2), tracked = below(4) != 0;

  const auto plan_of = [&](Pass pass, bool of_training) {
    return cuda::make_plan(c.problem, pass, of_training, aligned, cuda::query_device());
  };
  const int64_t mask_bytes = e.mask && aligned ? cuda::mask_bytes(c.problem) : 0;
  const Scratch mask(mask_bytes, 0xa5);
  Epilogue epilogue{e.activation, e.param, residual.data()};
  {
    const Plan plan = plan_of(Pass::forward, training);
    const Scratch workspace(cuda::workspace_bytes(c.problem, Pass::forward, training), 0xff);
    const simt::Watch watch_x(x.data(), x.bytes()), watch_y(y.data(), y.bytes());
    const simt::Watch watch_residual(residual.data(), residual.bytes()), watch_mask(mask.data(), size_t(mask_bytes));
    Forward args{};
    args.problem = c.problem, args.input = x.data(), args.output = y.data();
    args.weight = weight.param(), args.bias = bias.param();
    args.epilogue = epilogue, args.mask = mask_bytes > 0 ? mask.data() : nullptr;
    args.mean = mean.param(), args.var = var.param();
    args.moments = static_cast<double*>(moments.data());
    // Where the momentum is made from the count, the caller has counted already.
    int64_t counter = 41;
    if (tracked) {
      args.running = {running_mean.output(), running_var.output(), momentum, cumulative ? &batches : nullptr,
                      cumulative ? nullptr : &counter};
    }
    args.training = training, args.eps = eps, args.workspace = workspace.data();
    call(c, plan, Pass::forward, training, kernel_of(plan, dtype, epilogue, nullptr, nullptr, Pass::forward),
         [&](const cuda::Stream& stream) { cuda::forward(args, stream); });
    if (!workspace.margins_hold()) wrong(c, "written beside the workspace of forward");
    if (!mask.margins_hold()) wrong(c, "written beside the mask");
    written_once(c, "y", watch_y);
    was_read(c, "residual", watch_residual, 1, 0);
    for (const uint8_t times : watch_mask.writes) {
      if (times > 1) wrong(c, "a byte of the mask was written more than once");
    }
    if (counter != (training && tracked && !cumulative ? 42 : 41)) wrong(c, "batches counted");
    const int64_t least = training && plan.strategy == Strategy::streaming ? 2 : 1;
    // Values that are no numbers, or all the same, may cost a second reading.
    const int64_t pivots = !training ? 0 : C * plan.batch_splits * size_of(dtype);
    was_read(c, "x", watch_x, least, pivots + (c.odd_values && least == 2 ? int64_t(x.bytes()) : 0));
    if (plan.bytes != (least + 1) * int64_t(x.bytes())) wrong(c, "plan.bytes of forward");
  }
  std::vector<Statistics> used(static_cast<size_t>(C));
  for (int64_t i = 0; i < C; ++i) {
    const std::vector<double> values = values_of(x, shape, i), results = values_of(y, shape, i);
    const Statistics st = used[size_t(i)] = training ? statistics_of(values) : given(i);
    const double std = std::sqrt(st.var + eps);
    const double tight = dtype == DType::f64 ? 1e-12 : 2e-6;
    expect(c, "mean", i, moments.get(i), st.mean, tight, std);
    expect(c, "var", i, moments.get(C + i), st.var, tight, 1e-12);
    const double w = read(weight.param(), i, 1), b = read(bias.param(), i, 0);
    for (int64_t k = 0; k < count; ++k) {
      const double r = e.adds ? residual.get(index_of(shape, k / shape.S, i, k % shape.S)) : 0;
      const double z = (values[size_t(k)] - st.mean) / std * w + b + r;
      expect(c, "y", k * C + i, results[size_t(k)], fitting(dtype, act(e, z)), tol,
             std::abs(w) * 4 + std::abs(b) + std::abs(r) + (e.activation == Activation::identity ? 0 : std::abs(z)),
             least_of(dtype));
    }
    const double m = cumulative ? 1.0 / double(batches) : momentum;
    const double n = double(count);
    const bool updated = training && tracked;
    const auto blended = [&](double old, double batch) { return updated ? (1 - m) * old + m * batch : old; };
    expect(c, "running_mean", i, running_mean.get(i), blended(old_mean[size_t(i)], st.mean),
           tolerance(running_mean.dtype(), dtype), 4);
    expect(c, "running_var", i, running_var.get(i), blended(old_var[size_t(i)], st.var * n / (n - 1)),
           tolerance(running_var.dtype(), dtype), 4);
  }

  // ---- backward
  const bool wants_residual = chosen != nullptr && below(2);
  const int64_t wanted = (1 + below(7)) | (wants_residual ? 1 : 0);  // 1: of the input, 2: weight, 4: bias
  Tensor dy = random_tensor(c, 0.25),
         dr = wants_residual ? Tensor(dtype, shape.elements(), apart.misaligned) : Tensor();
  if (chosen != nullptr && has_mask(e.activation) && below(4) == 0) {  // what is blocked spoils nothing
    const int64_t i = below(shape.elements());
    const bool surely = dtype != DType::f16;  // there it may be what became zero in y
    if (surely && y.get(i) == 0) dy.set(i, below(2) ? NAN : INFINITY);
  }
  if (mask_bytes > 0) epilogue.residual = nullptr;
  Tensor given_dy(dtype, shape.elements());  // dz may be written over dy
  std::memcpy(given_dy.data(), dy.data(), dy.bytes());
  const bool in_place = wants_residual && mask_bytes > 0 && e.param == 0 && below(2);
  Tensor& dz_out = in_place ? dy : dr;
  Tensor dx = wanted & 1 ? Tensor(dtype, shape.elements(), c.misaligned) : Tensor();
  const Tensor dw = wanted & 2 ? random_param(c, 1 + below(2)) : Tensor();
  const Tensor db = wanted & 4 ? random_param(c, 1 + below(2)) : Tensor();
  {
    const Plan plan = plan_of(Pass::backward, training && wanted & 1);
    const Scratch workspace(cuda::workspace_bytes(c.problem, Pass::backward, training), 0xff);
    const simt::Watch watch_x(x.data(), x.bytes()), watch_dy(dy.data(), dy.bytes());
    const simt::Watch watch_dx(dx.data(), dx.bytes()), watch_dr(dr.data(), dr.bytes());
    const simt::Watch watch_residual(residual.data(), residual.bytes()), watch_mask(mask.data(), size_t(mask_bytes));
    Backward args{};
    args.problem = c.problem, args.grad_output = dy.data(), args.input = x.data(), args.grad_input = dx.data();
    args.weight = weight.param(), args.bias = bias.param();
    args.epilogue = epilogue, args.mask = mask_bytes > 0 ? mask.data() : nullptr, args.grad_residual = dz_out.data();
    args.moments = static_cast<const double*>(moments.data());
    args.grad_weight = dw.output(), args.grad_bias = db.output();
    args.training = training, args.eps = eps, args.workspace = workspace.data();
    call(c, plan, Pass::backward, training && wanted & 1,
         kernel_of(plan, dtype, epilogue, args.mask, dr.data(), Pass::backward),
         [&](const cuda::Stream& stream) { cuda::backward(args, stream); });
    if (!workspace.margins_hold()) wrong(c, "written beside the workspace of backward");
    written_once(c, "dx", watch_dx);
    if (!in_place) written_once(c, "dresidual", watch_dr);
    const int64_t least = training && wanted & 1 && plan.strategy == Strategy::streaming ? 2 : 1;
    const bool needs_z = mask_bytes == 0 && e.activation != Activation::identity;
    const bool needs_x = training || wanted & 6 || needs_z;  // in eval, dx is a multiple of dz
    was_read(c, "residual", watch_residual, needs_z ? least : 0, 0);
    for (const uint8_t times : watch_mask.writes) {
      if (times > 0) wrong(c, "the mask was written by backward");
    }
    if (!in_place) was_read(c, "dy", watch_dy, least, 0);
    was_read(c, "x", watch_x, needs_x ? least : 0, 0);
    if (plan.bytes != (2 * least + 1) * int64_t(x.bytes())) wrong(c, "plan.bytes of backward");
  }
  for (int64_t i = 0; i < C; ++i) {
    const std::vector<double> values = values_of(x, shape, i), gradients = values_of(given_dy, shape, i);
    const Statistics st = used[size_t(i)];
    const double rstd = 1 / std::sqrt(st.var + eps), w = read(weight.param(), i, 1), n = double(count);
    const double b = read(bias.param(), i, 0);
    const std::vector<double> outputs = values_of(y, shape, i);
    std::vector<double> dz(values.size()), slack(values.size());
    long double sums = 0, dots = 0;
    double sizes = 0, dot_sizes = 0, sum_slack = 0, dot_slack = 0;
    for (size_t k = 0; k < values.size(); ++k) {
      const double xhat = (values[k] - st.mean) * rstd;
      dz[k] = gradients[k];
      if (e.activation != Activation::identity) {
        const double r = e.adds ? residual.get(index_of(shape, int64_t(k) / shape.S, i, int64_t(k) % shape.S)) : 0;
        const double z = xhat * w + b + r;
        const double size = std::abs(w) * (4 + std::abs(xhat)) + std::abs(b) + std::abs(r);
        const double error =
            std::isfinite(size) ? tolerance(dtype == DType::f64 ? dtype : DType::f32, dtype) * size : 0;
        const Slope of_z = slope(e, z, outputs[k], error, dtype);
        dz[k] = of_z.value == 0 && has_mask(e.activation) ? 0 : gradients[k] * of_z.value;
        if (!has_mask(e.activation)) slack[k] = std::abs(gradients[k]) * (2 * error + tol);
        if (of_z.slack != 0) slack[k] += std::abs(gradients[k]) * of_z.slack;
        if (has_mask(e.activation) && of_z.value != 0 && of_z.value != 1) slack[k] += std::abs(dz[k]) * epsilon(dtype);
      }
      sums += dz[k], dots += dz[k] * xhat;
      sizes += std::abs(dz[k]), dot_sizes += std::abs(dz[k] * xhat);
      if (slack[k] != 0) sum_slack += slack[k], dot_slack += slack[k] * std::abs(xhat);
      if (wants_residual) {
        const int64_t at = index_of(shape, int64_t(k) / shape.S, i, int64_t(k) % shape.S);
        expect(c, "dresidual", at, dz_out.get(at), fitting(dtype, dz[k]), tol, 0, slack[k] + least_of(dtype));
      }
    }
    const double sum = double(sums), dot = double(dots);
    if (wanted & 2)
      expect(c, "dweight", i, dw.get(i), fitting(dw.dtype(), dot), tolerance(dw.dtype(), dtype), dot_sizes, dot_slack);
    if (wanted & 4)
      expect(c, "dbias", i, db.get(i), fitting(db.dtype(), sum), tolerance(db.dtype(), dtype), sizes, sum_slack);
    if (!(wanted & 1)) continue;
    const std::vector<double> results = values_of(dx, shape, i);
    for (size_t k = 0; k < values.size(); ++k) {
      const double xhat = (values[k] - st.mean) * rstd;
      const double want = w * rstd * (dz[k] - (training ? sum / n + xhat * dot / n : 0));
      const double from_sums = training ? sum_slack / n + std::abs(xhat) * dot_slack / n : 0;
      expect(c, "dx", int64_t(k) * C + i, results[k], want, tol, std::abs(w * rstd) * 4,
             slack[k] + from_sums == 0 ? 0 : std::abs(w * rstd) * (slack[k] + from_sums));
    }
  }
}

void test_running() {
  const int64_t C = 700;
  Tensor moments(DType::f64, 2 * C), mean(DType::f32, C), var(DType::f64, C);
  for (int64_t i = 0; i < 2 * C; ++i) moments.set(i, 1 + uniform());
  for (int64_t i = 0; i < C; ++i) mean.set(i, 1), var.set(i, 2);
  cuda::update_running_stats(static_cast<const double*>(moments.data()), C, 10,
                             {mean.output(), var.output(), 0.5, nullptr, nullptr}, {nullptr, nullptr});
  const Case c{"update_running_stats", {}, false, false};
  for (int64_t i = 0; i < C; ++i) {
    expect(c, "mean", i, mean.get(i), 0.5 + 0.5 * moments.get(i), 1e-7);
    expect(c, "var", i, var.get(i), 1 + 0.5 * moments.get(C + i) * 10 / 9, 1e-14);
  }
}

constexpr int64_t shapes[][3] = {
    {3, 5, 49},   {2, 7, 64},   {1, 3, 1},    {4, 8, 196},  {64, 4, 1},  {2, 64, 256}, {3, 63, 5},    {5, 1, 1000},
    {40, 16, 49}, {2, 300, 16}, {300, 24, 1}, {1, 9, 4099}, {7, 3, 700}, {64, 2, 512}, {16, 3, 1500}, {3, 2, 6000},
};

#if defined(SIMT_ONE_TYPE)  // where csrc was changed to have no others, because it has to compile often
constexpr std::array dtypes = {DType::f32};
#else
constexpr std::array dtypes = {DType::f32, DType::f64, DType::f16, DType::bf16};
#endif

#if SIMT_TSAN  // which is slow, and has nothing to see in arithmetic
constexpr int fused_a_case = 1;
#else
constexpr int fused_a_case = 2;
#endif

void test_seed(uint64_t seed, const std::string& filter) {
  simt::config.seed = seed;
  int64_t number = 0, epilogue = int64_t(seed);
  for (const Gpu& gpu : gpus) {
    simt::config.device = number++;
    simt::config.multiprocessors = gpu.multiprocessors;
    simt::config.shared_per_multiprocessor = gpu.shared_per_multiprocessor;
    simt::config.shared_per_block = gpu.shared_per_block;
    simt::config.cooperative = gpu.cooperative;
    for (const auto& [N, C, S] : shapes) {
      for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
        state = (seed + 1) * 0x9e3779b97f4a7c15 ^ uint64_t(number * 1000003 + N * 10007 + C * 101 + S);
        random_bits();
        const DType dtype = dtypes[size_t(below(int64_t(dtypes.size())))];
        const Case c{gpu.name + std::string(layout == Layout::channels_first ? " first " : " last ") +
                         std::to_string(N) + "x" + std::to_string(C) + "x" + std::to_string(S) + " " +
                         std::array{"f32", "f64", "f16", "bf16"}[size_t(dtype)] + " seed " + std::to_string(seed),
                     {{N, C, S, layout}, dtype},
                     below(8) == 0,
                     below(8) == 0};
        if (c.name.find(filter) == std::string::npos) continue;
        try {
          test_case(c, nullptr);
          for (int i = 0; i < fused_a_case; ++i) test_case(c, &epilogues[epilogue++ % int64_t(std::size(epilogues))]);
        } catch (const simt::error& e) {
          wrong(c, e.what());
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t seeds = argc > 1 ? std::atoll(argv[1]) : 1;
  const std::string filter = argc > 2 ? argv[2] : "";
#if SIMT_ASAN || SIMT_TSAN
  __sanitizer_set_death_callback([] { std::cerr << "FAILED: with " << doing << std::endl; });
#endif
  counters = std::make_unique<Scratch>(cuda::counter_bytes, 0);
  try {
    for (int64_t seed = 0; seed < seeds; ++seed) test_seed(uint64_t(seed), filter);
    test_running();
  } catch (const std::exception& e) {
    std::cout << "FAILED: " << e.what() << std::endl;
    return 1;
  }
  for (const auto& [name, times] : reached) std::cout << times << " x " << name << "\n";
  if (!filter.empty()) return 0;
  for (const auto& name : all_names()) {
    if (reached[name] != 0 || SIMT_TSAN) continue;
    std::cout << "FAILED: no plan was " << name << std::endl;
    return 1;
  }
  return 0;
}
