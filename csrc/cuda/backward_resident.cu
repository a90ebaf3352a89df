// The gradients of input, weight and bias in one launch that reads dy and x once: a group of blocks keeps both of a
// channel tile in shared memory.
#include "backward_epilogue.cuh"
#include "channel.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace fastbn::cuda {

namespace {

template <class T, class Access, class Epilogue>
__global__ void __launch_bounds__(resident_threads, 2)
    backward_resident(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, unsigned* barriers,
                      unsigned* tickets) {
  using A = acc_t<T>;
  using S = sum_t<T, Access::slots>;
  constexpr int V = full_vector<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const unsigned group = blockIdx.x / g.batch_splits, split = blockIdx.x % g.batch_splits;
  const T* const dy = static_cast<const T*>(args.grad_output);
  const T* const x = static_cast<const T*>(args.input);
  T* const dx = static_cast<T*>(args.grad_input);
  const Scratch<A> scratch{shared, g};
  const int c = int(threadIdx.x);
  // What follows from these is computed again for each use, behind opaque(): there are no registers to keep it in.
  const auto meeting = [&] { return group_meeting(g, group, split, barriers, tickets, shared); };
  const auto access_of = [&](int tile) { return Access(g, opaque(tile), unsigned(opaque(int(split)))); };
  const auto slice_of = [&](int tensor, const Access& access) {
    return Slice<T>(shared + g.slices_offset + tensor * g.slice_bytes, access);
  };
  unsigned before = meeting().counter_before();
  stagger(g);

  unsigned set = 0;
  for (int channel_tile = int(group); channel_tile < int(g.channel_tiles); channel_tile += int(g.groups), set ^= 1) {
    // Two sets of records: a block may be one channel tile ahead of another one of its group, which still reads the
    // last set.
    const auto records = [&] { return meeting().records(args.workspace, group, set); };
    const Epilogue epilogue{args};
    {
      Access access = access_of(channel_tile);
      const Slice<T> slice_dy = slice_of(0, access), slice_x = slice_of(1, access);
      const Tile tile = access.tile();
      const bool mine = c < tile.channels;
      const int64_t channel = tile.first_channel + c;
      const double mean = mine ? load(args.moments + channel) : 0;
      const double variance = mine ? load(args.moments + g.channels + channel) : 0;
      const LoadedParam weight(args.weight, channel, mine);
      const LoadedParam bias(Epilogue::recomputes ? args.bias : Param{nullptr, DType::f32}, channel, mine);
      fetch_all(access, [&](const VectorSpan& p, int step) {
        slice_dy.fetch(dy, p, step);
        slice_x.fetch(x, p, step);
      });
      if (mine) {
        const double w = weight.value(args.weight, 1);
        scratch.parameter(0, c) = mean, scratch.parameter(1, c) = variance, scratch.parameter(2, c) = w;
        if constexpr (Epilogue::recomputes) {
          set_normalization(mean, variance, args.eps, w, bias.value(args.bias, 0), scratch, c);
        } else {
          scratch.at(0, c) = coefficient<A>(mean);
        }
      }
    }
    __syncthreads();
    {
      Access access = access_of(channel_tile);
      const Slice<T> slice_dy = slice_of(0, access), slice_x = slice_of(1, access);
      A z[Epilogue::recomputes ? 3 : 1][Access::slots];  // mean; scale, shift
      load_coefficients(access, scratch, z);
      ThreadSums<T, Access::slots, Access::slots == 1> sums;
      MaskPrefetch<Access> masks{static_cast<const uint8_t*>(args.mask)};
      if constexpr (Epilogue::masked) access.start(), masks.fetch(access);
      const auto consume = [&](const VectorSpan& p, int step, auto with_epilogue, auto with_sums) {
        A dz[V], value[V];
        const Bytes16 raw_dy = shared_load16(slice_dy.at(step));
        widen<T, V>(shared_load16(slice_x.at(step)), value);
        if constexpr (decltype(with_epilogue)::value) {
          if constexpr (reloads_coefficients<Access, Epilogue>) load_coefficients(access, scratch, z);
          const auto z_of = [&](int j) {
            const int slot = Access::slots == 1 ? 0 : j;
            return normalized(value[j], z[0][slot], z[1][slot], z[2][slot]);
          };
          typename Epilogue::Extra extra;
          if constexpr (Epilogue::masked) {
            extra = masks.at(access, step);
          } else {
            extra = epilogue.load_extra(p);
          }
          // Stored over dy, for the same thread to read again.
          shared_store16(slice_dy.at(step), epilogue.apply(extra, raw_dy, z_of, dz));
        } else {
          widen<T, V>(raw_dy, dz);
        }
        if constexpr (decltype(with_sums)::value) {
          each_element<V, Access::slots>(
              p, [&](int j, int slot) { sums.add(slot, S(dz[j]), S(value[j]) - S(z[0][slot])); });
        }
      };
      const std::bool_constant<!Epilogue::plain> with_epilogue;
      const std::true_type yes;
      const std::false_type no;
      // In two loops where there are not enough registers for one.
      constexpr bool apart = reloads_coefficients<Access, Epilogue> ||
                             (Access::slots == 8 && (Epilogue::recomputes || (spares_registers && !Epilogue::plain)));
      if constexpr (apart) {
        consume_all(access, [&](const VectorSpan& p, int step) { consume(p, step, yes, no); }, [] {});
        load_coefficients(access, scratch, z);
        consume_all(access, [&](const VectorSpan& p, int step) { consume(p, step, no, yes); }, [&] { sums.flush(); });
      } else {
        consume_all(
            access, [&](const VectorSpan& p, int step) { consume(p, step, with_epilogue, yes); },
            [&] { sums.flush(); });
      }
      block_sums(access, sums.firsts(), sums.seconds(), scratch, [&](int of, const Sums& s) {
        scratch.record(of) = {s.first, s.second};
        if (g.batch_splits > 1) meeting().publish(records(), of, {s.first, s.second});
      });
      __syncthreads();
    }

    {
      Access access = access_of(channel_tile);
      const Tile tile = access.tile();
      const auto finish = [&](int of, const Record& r) {
        const double mean = scratch.parameter(0, of), variance = scratch.parameter(1, of);
        const Sums sums = corrected<A>(mean, r);
        scratch.record(of) = {sums.first, sums.second};
        set_input_gradient(mean, variance, args.eps, scratch.parameter(2, of), sums, g.count, scratch, of);
      };
      if (has_clusters && g.cluster > 1) {
        meeting().template merge_in_clusters<OfSums>(access, scratch, records(), tile.channels, before, finish);
      } else if (g.batch_splits > 1) {
        meeting().template merge_in_all<OfSums>(access, records(), tile.channels, before, finish);
      } else if (c < tile.channels) {
        finish(c, scratch.record(c));
      }
    }
    __syncthreads();

    Access access = access_of(channel_tile);
    const Slice<T> slice_dy = slice_of(0, access), slice_x = slice_of(1, access);
    A z[4][Access::slots];  // mean, x_scale, scale, shift
    load_coefficients(access, scratch, z);
    access.start();
#pragma unroll 1
    for (int step = 0; step < access.steps; ++step, access.next()) {
      const VectorSpan p = access.span();
      A dz[V], value[V];
      const Bytes16 raw_dz = shared_load16(slice_dy.at(step));
      epilogue.store_residual_grad(p, raw_dz);
      widen<T, V>(raw_dz, dz);
      widen<T, V>(shared_load16(slice_x.at(step)), value);
      differentiate<Access::slots>(dz, value, z);
      store_span<T, V>(dx, p, narrow<T, V>(dz));
    }
    const Tile written = access_of(channel_tile).tile();
    if (split == 0 && c < written.channels) {
      const Record r = scratch.record(c);
      write_param_grads(args, written.first_channel + c, scratch.parameter(1, c), {r.first, r.second});
    }
    __syncthreads();  // the scratch is written again for the next channel tile
  }
  if (has_clusters && g.cluster > 1) cluster_arrive(), cluster_wait();  // others read the shared memory of this block
}

template <class Body>
void with_kernel(const Plan& plan, const Backward& args, const Body& body) {
  dispatch_full(plan, args.problem.dtype, [&](auto type, auto access) {
    using T = typename decltype(type)::type;
    dispatch_backward_epilogue<T, full_vector<T>>(args, [&](auto epilogue) {
      body(backward_resident<T, typename decltype(access)::type, typename decltype(epilogue)::type>);
    });
  });
}

}  // namespace

bool launch_backward_resident(const Plan& plan, const Backward& args, const Stream& stream) {
  bool launched = false;
  with_kernel(plan, args, [&](auto kernel) { launched = launch_group_kernel(kernel, plan, args, stream); });
  return launched;
}

int64_t backward_resident_blocks_of(const Plan& plan, const Backward& args) {
  int64_t blocks = 0;
  with_kernel(plan, args, [&](auto kernel) { blocks = resident_blocks_with(kernel, plan); });
  return blocks;
}

}  // namespace fastbn::cuda
