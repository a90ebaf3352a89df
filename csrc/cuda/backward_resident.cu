// The gradients of input, weight and bias in one launch that reads dy and x once: a group of blocks keeps both of a
// channel tile in shared memory.
#include "backward_epilogue.cuh"
#include "channel.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace fastbn::cuda {

namespace {

template <class T, class Access, class Epilogue>
__global__ void __launch_bounds__(threads_per_block, 4)
    backward_resident(const __grid_constant__ Geometry g, const __grid_constant__ Backward args, unsigned* counters) {
  using A = acc_t<T>;
  using S = sum_t<T, Access::slots>;
  constexpr int V = full_vector<T>;
  FASTBN_DYNAMIC_SHARED(shared);
  const unsigned group = blockIdx.x / g.batch_splits, split = blockIdx.x % g.batch_splits;
  const T* const dy = static_cast<const T*>(args.grad_output);
  const T* const x = static_cast<const T*>(args.input);
  T* const dx = static_cast<T*>(args.grad_input);
  const Scratch<A> scratch{shared, g};
  const Slice<T, Access> slice_dy{shared + g.slices_offset}, slice_x{shared + g.slices_offset + g.slice_bytes};
  const int c = int(threadIdx.x);
  stagger(g);

  unsigned set = 0;
  for (int64_t channel_tile = group; channel_tile < g.channel_tiles; channel_tile += g.groups, set ^= 1) {
    Access access(g, channel_tile, split);
    const Tile tile = access.tile();
    fetch_all(access, [&](const VectorSpan& p, int step) {
      slice_dy.fetch(dy, access, p, step);
      slice_x.fetch(x, access, p, step);
    });

    const Epilogue epilogue{args};
    if (c < tile.channels) {
      if constexpr (Epilogue::recomputes) {
        set_normalization(args, tile.first_channel + c, scratch, c);
      } else {
        scratch.at(0, c) = coefficient<A>(args.moments[tile.first_channel + c]);
      }
    }
    __syncthreads();
    {
      A z[Epilogue::recomputes ? 3 : 1][Access::slots];  // mean; scale, shift
      load_coefficients(access, scratch, z);
      ThreadSums<T, Access::slots, Access::slots == 1> sums;
      MaskPrefetch<Access> masks{static_cast<const uint8_t*>(args.mask)};
      if constexpr (Epilogue::masked) access.start(), masks.fetch(access);
      const auto consume = [&](const VectorSpan& p, int step, auto with_epilogue, auto with_sums) {
        A dz[V], value[V];
        const Bytes16 raw_dy = shared_load16(slice_dy.at(access, step));
        widen<T, V>(shared_load16(slice_x.at(access, step)), value);
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
          shared_store16(slice_dy.at(access, step), epilogue.apply(extra, raw_dy, z_of, dz));
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
      constexpr bool apart =
          reloads_coefficients<Access, Epilogue> || (spares_registers && !Epilogue::plain && Access::slots == 8);
      if constexpr (apart) {
        consume_all(access, [&](const VectorSpan& p, int step) { consume(p, step, yes, no); }, [] {});
        load_coefficients(access, scratch, z);
        consume_all(access, [&](const VectorSpan& p, int step) { consume(p, step, no, yes); }, [&] { sums.flush(); });
      } else {
        consume_all(
            access, [&](const VectorSpan& p, int step) { consume(p, step, with_epilogue, yes); },
            [&] { sums.flush(); });
      }
      block_sums(access, sums.firsts(), sums.seconds(), scratch);
    }

    if (g.batch_splits > 1) {
      // Two sets of partial sums: a block may be one channel tile ahead of another one of its group, which still reads
      // the last set.
      Sums* const here = static_cast<Sums*>(args.workspace) + (2 * group + set) * g.batch_splits * g.channels_per_tile;
      if (c < tile.channels) here[split * g.channels_per_tile + c] = scratch.template partial<Sums>(c);
      group_barrier(counters + group * counter_stride, split, g.batch_splits);
      merge_partials<OfSums>(here, g, tile.channels, scratch);
    }
    if (c < tile.channels) {
      const Sums sums = corrected<A>(args, tile.first_channel + c, scratch.template partial<Sums>(c));
      if (split == 0) write_param_grads(args, tile.first_channel + c, sums);
      set_input_gradient(args, tile.first_channel + c, sums, double(args.problem.shape.per_channel()), scratch, c);
    }
    __syncthreads();

    A z[4][Access::slots];  // mean, x_scale, scale, shift
    load_coefficients(access, scratch, z);
    access.start();
    for (int step = 0; access.more(); ++step, access.next()) {
      const VectorSpan p = access.span();
      A dz[V], value[V];
      const Bytes16 raw_dz = shared_load16(slice_dy.at(access, step));
      epilogue.store_residual_grad(p, raw_dz);
      widen<T, V>(raw_dz, dz);
      widen<T, V>(shared_load16(slice_x.at(access, step)), value);
      differentiate<Access::slots>(dz, value, z);
      store_span<T, V>(dx, p, narrow<T, V>(dz));
    }
    __syncthreads();  // the scratch is written again for the next channel tile
  }
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

void launch_backward_resident(const Plan& plan, const Backward& args, const Stream& stream) {
  with_kernel(plan, args, [&](auto kernel) {
    launch({plan.blocks, plan.threads, plan.shared_bytes, plan.cooperative, stream.handle}, kernel, geometry_of(plan),
           args, stream.counters);
  });
}

int64_t backward_resident_blocks_of(const Plan& plan, const Backward& args) {
  int64_t blocks = 0;
  with_kernel(plan, args, [&](auto kernel) { blocks = resident_blocks(kernel, plan.threads, plan.shared_bytes); });
  return blocks;
}

}  // namespace fastbn::cuda
