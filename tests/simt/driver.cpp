// Runs the CUDA kernels on the CPU, without torch and Python, and compares them with a float64 reference.
//
// Arguments: a number of seeds, and optionally a word that the names of cases must contain. The exit status is 0 if all
// results are right, the kernels read and wrote the bytes of their plan, and every kind of plan was reached; otherwise
// the first failure is printed.
#include <array>
#include <cmath>
#include <iostream>

#include "driver_epilogues.h"
#include "driver_traffic.h"

using namespace driver;

namespace {

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

  const int64_t mask_bytes =
      e.mask ? cuda::make_plan(c.problem, Pass::forward, training, aligned, cuda::query_device()).mask_bytes : 0;
  const Scratch mask(mask_bytes, 0xa5);
  Epilogue epilogue{e.activation, e.param, residual.data()};
  {
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
    args.training = training, args.eps = eps;
    const Plan plan = cuda::plan(args);
    const Scratch workspace(plan.workspace_bytes, 0xff);
    args.workspace = workspace.data();
    call(c, plan, Pass::forward, training, kernel_of(plan, dtype, epilogue, nullptr, nullptr, Pass::forward),
         [&](const cuda::Stream& stream) { cuda::forward(plan, args, stream); });
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
    const simt::Watch watch_x(x.data(), x.bytes()), watch_dy(dy.data(), dy.bytes());
    const simt::Watch watch_dx(dx.data(), dx.bytes()), watch_dr(dr.data(), dr.bytes());
    const simt::Watch watch_residual(residual.data(), residual.bytes()), watch_mask(mask.data(), size_t(mask_bytes));
    Backward args{};
    args.problem = c.problem, args.grad_output = dy.data(), args.input = x.data(), args.grad_input = dx.data();
    args.weight = weight.param(), args.bias = bias.param();
    args.epilogue = epilogue, args.mask = mask_bytes > 0 ? mask.data() : nullptr, args.grad_residual = dz_out.data();
    args.moments = static_cast<const double*>(moments.data());
    args.grad_weight = dw.output(), args.grad_bias = db.output();
    args.training = training, args.eps = eps;
    const Plan plan = cuda::plan(args);
    const Scratch workspace(plan.workspace_bytes, 0xff);
    args.workspace = workspace.data();
    call(c, plan, Pass::backward, training && wanted & 1,
         kernel_of(plan, dtype, epilogue, args.mask, dr.data(), Pass::backward),
         [&](const cuda::Stream& stream) { cuda::backward(plan, args, stream); });
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
                             {mean.output(), var.output(), 0.5, nullptr, nullptr}, {nullptr, nullptr, nullptr});
  const Case c{"update_running_stats", {}, false, false};
  for (int64_t i = 0; i < C; ++i) {
    expect(c, "mean", i, mean.get(i), 0.5 + 0.5 * moments.get(i), 1e-7);
    expect(c, "var", i, var.get(i), 1 + 0.5 * moments.get(C + i) * 10 / 9, 1e-14);
  }
}

constexpr int64_t shapes[][3] = {
    {3, 5, 49},  {2, 7, 64},   {1, 3, 1},     {4, 8, 196},  {64, 4, 1},    {2, 64, 256},
    {3, 63, 5},  {5, 1, 1000}, {40, 16, 49},  {2, 300, 16}, {300, 24, 1},  {1, 9, 4099},
    {7, 3, 700}, {64, 2, 512}, {16, 3, 1500}, {3, 2, 6000}, {2, 16, 2048},
};

#if defined(SIMT_ONE_TYPE)  // where csrc was changed to have no others, because it has to compile often
constexpr std::array dtypes = {DType::SIMT_ONE_TYPE};
#else
constexpr std::array dtypes = {DType::f32, DType::f64, DType::f16, DType::bf16};
#endif

#if SIMT_TSAN  // which is slow, and has nothing to see in arithmetic
constexpr int fused_a_case = 1;
#else
constexpr int fused_a_case = 2;
#endif

void use(const Gpu& gpu) {
  simt::config.multiprocessors = gpu.multiprocessors;
  simt::config.shared_per_multiprocessor = gpu.shared_per_multiprocessor;
  simt::config.shared_per_block = gpu.shared_per_block;
  simt::config.cooperative = gpu.cooperative;
  simt::config.cluster = gpu.cluster, simt::config.merged_at_once = gpu.merged_at_once;
}

// Cases too large for all seeds, which run when they are asked for by name.
struct LargeCase {
  Gpu gpu;
  Shape shape;
};
constexpr LargeCase large_cases[] = {
    // more records of a channel than are staged at once
    {{"large: streaming", 24, 36 << 10, 34 << 10, false, 1, 1 << 20}, {75, 32, 120, Layout::channels_last}},
    // more than four vectors a thread, so that masks are fetched again
    {{"large: one block", 1, 200 << 10, 160 << 10, true, 1, 512}, {10, 1, 1152, Layout::channels_first}},
    // several clusters, the last of which has fewer values
    {{"large: clusters", 16, 64 << 10, 48 << 10, true, 4, 512}, {77, 32, 49, Layout::channels_last}},
};

void test_large(const std::string& name) {
  int64_t number = std::size(gpus);
  for (const auto& [gpu, shape] : large_cases) {
    simt::config.device = number++;
    if (gpu.name != name) continue;
    use(gpu);
    state = 1;
    const Case c{name, {shape, DType::f32}, false, false};
    test_case(c, nullptr);
    for (const auto& epilogue : epilogues) test_case(c, &epilogue);
    return;
  }
  throw std::runtime_error("there is no case " + name);
}

void test_seed(uint64_t seed, const std::string& filter) {
  simt::config.seed = seed;
  int64_t number = 0, epilogue = int64_t(seed);
  for (const Gpu& gpu : gpus) {
    simt::config.device = number++;
    use(gpu);
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
          // Before anything ran: the largest groups are for the other modes.
          if (SIMT_TSAN && std::string(e.what()).find("ThreadSanitizer has no room") != std::string::npos) continue;
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
    if (filter.rfind("large: ", 0) == 0) {
      test_large(filter);
    } else {
      for (int64_t seed = 0; seed < seeds; ++seed) test_seed(uint64_t(seed), filter);
      test_running();
    }
  } catch (const std::exception& e) {
    std::cout << "FAILED: " << e.what() << std::endl;
    return 1;
  }
  for (const auto& [name, times] : reached) std::cout << times << " x " << name << "\n";
  if (!filter.empty()) return 0;
  for (const auto& name : all_names()) {
    if (reached[name] != 0 || SIMT_ASAN || SIMT_TSAN) continue;  // those have fewer cases
    std::cout << "FAILED: no plan was " << name << std::endl;
    return 1;
  }
  return 0;
}
