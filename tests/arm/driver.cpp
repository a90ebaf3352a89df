// Runs the kernels of csrc/cpu without torch and compares every result with a reference in double, whose sums have 128
// bits. Prints a digest of the bits of each case, the largest errors, and as the last line "N passed, M failed".
// run.py builds it for 64-bit Arm and for this machine, and compares the digests.
#include <cstdio>
#include <sstream>
#include <vector>

#include "cpu/backend.h"
#include "cpu/parallel.h"
#include "reference.h"

// ---- cpu/parallel.h, on one thread: results do not depend on the number of threads, plans of eval do ----------------

namespace fastbn::cpu {

int64_t thread_count() { return 3; }

void run_parallel(int64_t items, bool, Order order, Run run, const void* body) {
  for (int64_t i = 0; i < items; ++i) run(body, order == Order::forwards ? i : items - 1 - i);
}

}  // namespace fastbn::cpu

namespace {

using namespace arm_test;

constexpr double eps = 1e-5, momentum = 0.25;

struct Channel {
  double mean, var, rstd, weight, bias;
};

class Test {
 public:
  explicit Test(const Case& c) : c_(c), shape_(c.shape), dtype_(c.dtype), e_(c.epilogue), random_(c.name()) {}

  uint64_t run() {
    make_inputs();
    forward();
    check_forward();
    backward();
    check_backward();
    if (c_.epilogue.mask && !c_.not_numbers) compare_with_recomputed_z();
    return digest_.value();
  }

 private:
  Tensor activations() { return Tensor(dtype_, shape_.elements(), c_.misaligned); }

  Tensor random_values(double center, double width) {
    Tensor t = activations();
    for (int64_t i = 0; i < shape_.C; ++i) {
      for (int64_t k = 0; k < n(); ++k) {
        t.set(index_of(shape_, i, k), center * double(i % 7 - 3) + width * (0.5 + double(i % 3)) * random_.noise());
      }
    }
    return t;
  }

  Tensor parameter(double center) {
    if (c_.params == 0) return {};
    Tensor t(c_.params == 1 ? DType::f32 : dtype_, shape_.C);
    for (int64_t i = 0; i < shape_.C; ++i) t.set(i, i == 1 ? 0 : center + random_.noise());
    return t;
  }

  int64_t n() const { return shape_.per_channel(); }
  double z_of(int64_t i, int64_t k) const {
    const int64_t at = index_of(shape_, i, k);
    const Channel& ch = channels_[size_t(i)];
    return (x_.get(at) - ch.mean) * ch.rstd * ch.weight + ch.bias + (residual_ ? residual_.get(at) : 0);
  }
  double size_of_z(int64_t i, int64_t k) const {
    const int64_t at = index_of(shape_, i, k);
    const Channel& ch = channels_[size_t(i)];
    // What the mean is off by: with float the shift makes up for its rounding, with double nothing does.
    const double mean = dtype_ == DType::f64 ? std::abs(ch.mean) + std::sqrt(ch.var) : 0;
    return (std::abs(x_.get(at) - ch.mean) + mean) * std::abs(ch.rstd * ch.weight) + std::abs(ch.bias) +
           (residual_ ? std::abs(residual_.get(at)) : 0);
  }

  void make_inputs() {
    x_ = random_values(dtype_ == DType::bf16 ? 1 : 2, 1);
    if (c_.not_numbers) x_.set(index_of(shape_, shape_.C - 1, n() / 2), NAN);
    weight_ = parameter(1), bias_ = parameter(0);
    mean_ = Tensor(DType::f64, shape_.C), var_ = Tensor(DType::f64, shape_.C);
    for (int64_t i = 0; i < shape_.C; ++i) {
      Wide sum = 0, squares = 0;
      for (int64_t k = 0; k < n(); ++k) sum += x_.get(index_of(shape_, i, k));
      const double mean = double(sum / n());
      for (int64_t k = 0; k < n(); ++k) {
        const double d = x_.get(index_of(shape_, i, k)) - mean;
        squares += d * d;
      }
      double var = double(squares / n());
      mean_.set(i, mean), var_.set(i, var);
      if (c_.mode != Mode::train)
        mean_.set(i, std::isnan(mean) ? 0 : mean + 0.125), var_.set(i, std::isnan(var) ? 1 : var + 0.5);
      channels_.push_back({mean_.get(i), var_.get(i), 1 / std::sqrt(var_.get(i) + eps), read(weight_.param(), i, 1),
                           read(bias_.param(), i, 0)});
    }
    if (!e_.adds) return;
    residual_ = random_values(0.125, 1);
    // Some sums are zero but for roundings.
    Tensor none;
    std::swap(none, residual_);
    for (int64_t i = 0; i < shape_.C; ++i) {
      for (int64_t k = 0; k < n(); k += 5) none.set(index_of(shape_, i, k), -z_of(i, k));
    }
    std::swap(none, residual_);
  }

  Problem problem() const { return {shape_, dtype_, c_.streams ? int64_t(1) << 24 : 1}; }

  void forward() {
    y_ = activations();
    moments_ = Tensor(DType::f64, 2 * shape_.C);
    running_mean_ = Tensor(DType::f32, shape_.C), running_var_ = Tensor(DType::f32, shape_.C);
    for (int64_t i = 0; i < shape_.C; ++i) running_mean_.set(i, 0.5), running_var_.set(i, 2);
    const cpu::Plan plan = cpu::plan(problem());
    const Memory workspace(plan.workspace_bytes);
    mask_ = std::make_unique<Memory>(e_.mask ? plan.mask_bytes : 0);
    Forward args{};
    args.problem = problem(), args.input = x_.data(), args.output = y_.data();
    args.weight = weight_.param(), args.bias = bias_.param();
    args.epilogue = {e_.activation, e_.param, residual_.data()};
    args.mask = e_.mask ? mask_->data() : nullptr;
    args.mean = mean_.param(), args.var = var_.param(), args.precomputed_stats = c_.mode == Mode::global;
    args.moments = reinterpret_cast<double*>(moments_.data());
    args.running = {running_mean_.output(), running_var_.output(), momentum, nullptr, nullptr};
    args.training = c_.mode == Mode::train, args.eps = eps, args.workspace = workspace.data();
    cpu::forward(plan, args);
    if (!workspace.margins_hold() || !y_.margins_hold() || !mask_->margins_hold() || !moments_.margins_hold()) {
      throw Wrong("forward wrote outside of its outputs");
    }
    for (const Tensor* t : {&y_, &moments_, &running_mean_, &running_var_}) digest_.add(*t);
  }

  void check_forward() {
    for (int64_t i = 0; i < shape_.C; ++i) {
      const Channel& ch = channels_[size_t(i)];
      const double size = std::sqrt(ch.var) + (dtype_ == DType::f64 ? std::abs(ch.mean) : 0);
      expect(c_, "mean", DType::f64, i, 0, moments_.get(i), ch.mean, size);
      expect(c_, "var", DType::f64, i, 0, moments_.get(shape_.C + i), ch.var, ch.var);
      const bool updated = c_.mode == Mode::train;
      const double count = double(n()), m = updated ? momentum : 0;
      const double unbiased = updated ? ch.var * count / (count - 1) : 0;
      expect(c_, "running", DType::f32, i, 0, running_mean_.get(i), 0.5 * (1 - m) + m * ch.mean,
             0.5 + std::sqrt(ch.var));
      expect(c_, "running", DType::f32, i, 1, running_var_.get(i), 2 * (1 - m) + m * unbiased, 2 + unbiased);
      for (int64_t k = 0; k < n(); ++k) {
        const double want = act(e_, z_of(i, k));
        expect(c_, "y", dtype_, i, k, y_.get(index_of(shape_, i, k)), want, size_of_z(i, k) + std::abs(want));
      }
    }
  }

  struct Gradients {
    Tensor input, residual, weight, bias;
  };

  Gradients call_backward(const Tensor& dy, bool with_mask, bool in_place, bool wants_dz) {
    Gradients g{activations(), in_place ? dy : activations(), Tensor(DType::f32, shape_.C),
                Tensor(DType::f32, shape_.C)};
    const cpu::Plan plan = cpu::plan(problem());
    const Memory workspace(plan.workspace_bytes);
    Backward args{};
    args.problem = problem(), args.grad_output = dy.data(), args.input = x_.data(), args.grad_input = g.input.data();
    args.weight = weight_.param(), args.bias = bias_.param();
    args.epilogue = {e_.activation, e_.param, with_mask ? nullptr : residual_.data()};
    args.mask = with_mask ? mask_->data() : nullptr;
    args.grad_residual = wants_dz ? g.residual.data() : nullptr;
    args.moments = reinterpret_cast<const double*>(moments_.data());
    if (c_.mode == Mode::global) {
      args.global_sums = total_.data(), args.global_counts = counts_.data();
    } else {
      args.grad_weight = g.weight.output(), args.grad_bias = g.bias.output();
    }
    args.training = c_.mode != Mode::eval, args.eps = eps, args.workspace = workspace.data();
    cpu::backward(plan, args);
    if (!workspace.margins_hold() || !g.input.margins_hold() || !g.residual.margins_hold()) {
      throw Wrong("backward wrote outside of its outputs");
    }
    return g;
  }

  void backward() {
    dy_ = random_values(0.25, 1);
    for (int64_t i = 0; i < shape_.C; ++i) {
      for (int64_t k = 0; k < n(); ++k) {
        if (near_a_jump(e_, z_of(i, k), size_of_z(i, k))) dy_.set(index_of(shape_, i, k), 0);
      }
    }
    if (c_.mode == Mode::global) {
      total_.resize(size_t(2 * shape_.C)), counts_.assign(size_t(shape_.C), double(3 * n()));
      for (double& t : total_) t = 4 * random_.noise();
    }
    gradients_ = call_backward(dy_, e_.mask, false, e_.adds);
    digest_.add(gradients_.input);
    if (e_.adds) digest_.add(gradients_.residual);
    if (c_.mode != Mode::global) digest_.add(gradients_.weight), digest_.add(gradients_.bias);
  }

  void check_backward() {
    const double half_unit = unit_of_arithmetic(dtype_);
    std::vector<double> dz(n()), sizes(n());
    for (int64_t i = 0; i < shape_.C; ++i) {
      const Channel& ch = channels_[size_t(i)];
      Wide sum = 0, dot = 0;
      double sum_size = 0, dot_size = 0;
      for (int64_t k = 0; k < n(); ++k) {
        const int64_t at = index_of(shape_, i, k);
        const double dy = dy_.get(at), xhat = (x_.get(at) - ch.mean) * ch.rstd;
        const double d = dz[size_t(k)] = dy == 0 ? 0 : dy * act_slope(e_, z_of(i, k));
        // A smooth derivative changes by at most 1.2 times what z is off by; the others not at all.
        const bool smooth = !has_mask(e_.activation) && e_.activation != Activation::identity;
        const double s = sizes[size_t(k)] = std::abs(d) + (smooth ? std::abs(dy) * (1 + size_of_z(i, k)) : 0);
        sum += d, dot += d * xhat;
        sum_size += s, dot_size += s * std::abs(xhat);
        if (e_.adds) expect(c_, "grad_residual", dtype_, i, k, gradients_.residual.get(at), d, s);
      }
      const double count = c_.mode == Mode::global ? counts_[size_t(i)] : double(n());
      double mean_dz = double(sum) / count, mean_dot = double(dot) / count;
      if (c_.mode == Mode::global) {
        mean_dz = total_[size_t(shape_.C + i)] / count, mean_dot = total_[size_t(i)] / count;
        sum_size = std::abs(mean_dz) * count, dot_size = std::abs(mean_dot) * count;
      } else {
        expect(c_, "grad_weight", DType::f32, i, 0, gradients_.weight.get(i), double(dot), dot_size);
        expect(c_, "grad_bias", DType::f32, i, 0, gradients_.bias.get(i), double(sum), sum_size);
      }
      const bool constant = c_.mode == Mode::eval;
      for (int64_t k = 0; k < n(); ++k) {
        const int64_t at = index_of(shape_, i, k);
        const double xhat = (x_.get(at) - ch.mean) * ch.rstd, factor = ch.weight * ch.rstd;
        const double want = factor * (constant ? dz[size_t(k)] : dz[size_t(k)] - mean_dz - xhat * mean_dot);
        const double size = sizes[size_t(k)] + (constant ? 0 : (sum_size + std::abs(xhat) * dot_size) / count);
        expect(c_, "grad_input", dtype_, i, k, gradients_.input.get(at), want, std::abs(factor) * size + half_unit);
      }
    }
  }

  // dz from a mask, also over dy itself, and from z computed once more, where z may lie at a jump: the same numbers. So
  // is the gradient of the input, where no sums are in it, whose order is the code's own.
  void compare_with_recomputed_z() {
    const Tensor dy = random_values(0.25, 1);
    const Gradients from_z = call_backward(dy, false, false, true);
    const auto same = [&](const Gradients& a, const char* what) {
      for (int64_t i = 0; i < shape_.elements(); ++i) {
        const bool same_input = c_.mode == Mode::train || a.input.get(i) == from_z.input.get(i);
        if (same_input && a.residual.get(i) == from_z.residual.get(i)) continue;
        std::ostringstream s;
        s.precision(17);
        s << "element " << i << " of dz is " << a.residual.get(i) << " from the mask" << what << ", and "
          << from_z.residual.get(i) << " from z";
        throw Wrong(s.str());
      }
    };
    same(call_backward(dy, true, false, true), "");
    if (e_.param == 0) same(call_backward(dy.copy(), true, true, true), ", in place,");
  }

  const Case& c_;
  const Shape shape_;
  const DType dtype_;
  const EpilogueCase& e_;
  Random random_;
  Digest digest_;
  Tensor x_, weight_, bias_, mean_, var_, residual_, y_, moments_, running_mean_, running_var_, dy_;
  std::vector<Channel> channels_;
  std::vector<double> total_, counts_;
  std::unique_ptr<Memory> mask_;
  Gradients gradients_;
};

}  // namespace

int main(int count, char** arguments) {
  const std::string part = count > 1 ? arguments[1] : "";  // of the names of the cases to run
  int passed = 0, failed = 0;
  const auto run = [&](const Case& c) {
    if (c.name().find(part) == std::string::npos) return;
    try {
      std::printf("%s %016llx\n", c.name().c_str(), static_cast<unsigned long long>(Test(c).run()));
      ++passed;
    } catch (const Wrong& wrong) {
      std::printf("FAILED %s: %s\n", c.name().c_str(), wrong.what());
      ++failed;
    }
  };
  int turn = 0;
  for (const ShapeCase& s : shapes) {
    for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
      if (s.S == 1 && layout == Layout::channels_last) continue;
      for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
        for (const Mode mode : {Mode::train, Mode::eval, Mode::global}) {
          const EpilogueCase& e = epilogues[turn % number_of_epilogues];
          const Shape shape{s.N, s.C, s.S, layout};
          // 0: as a batch norm alone. The others walk through the epilogues and what else varies.
          run({shape, dtype, mode, epilogues[0], turn % 2 == 1, false, turn % 5 == 0, 1 + turn % 2});
          run({shape, dtype, mode, e, turn % 3 == 1, turn % 4 == 3, false, turn % 3});
          ++turn;
        }
      }
    }
  }
  for (const EpilogueCase& e : epilogues) {
    for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
      for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
        for (const Mode mode : {Mode::train, Mode::eval})
          run({{3, 20, 50, layout}, dtype, mode, e, false, false, false, 2});
      }
    }
  }
  for (const auto& [name, units] : largest) std::printf("# at most %.2f units off: %s\n", units, name.c_str());
  std::printf("# %s, %s\n", cpu::capability(), __VERSION__);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0 || passed == 0;
}
