// Multiply rows of a weight where they lie, chosen by their ids.
//
// This is one text for Metal, for CUDA, and in the tests for C++. It has no types of its
// own for numbers and pointers: Metal puts small inputs into another address space
// than large ones, and a template takes either.
// Shapes: TOKENS tokens, D model width, K ids, weight [n, D]. RUN values of a row, side
// by side, are what one thread takes at once.

#if defined(__CUDACC__)
#define ROWS_FUNCTION __device__ inline
#else
#define ROWS_FUNCTION inline
#endif
// Arrays stay in registers only if every index is known to the compiler.
#define ROWS_UNROLL _Pragma("unroll")

namespace mlx_flash {

// Threads that add up what each of them has, on every GPU that MLX supports.
enum { LANES = 32 };

#if defined(__CUDACC__)
ROWS_FUNCTION float sum_of_lanes(float value) {
  ROWS_UNROLL
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}
#else
ROWS_FUNCTION float sum_of_lanes(float value) {
  return metal::simd_sum(value);
}
#endif

template <int RUN>
struct Run {
  float value[RUN];
};

// Rows of plain numbers, [n, D]. What is beyond the end of a row is zero.
template <int D, int RUN, typename Values>
struct FloatRows {
  Values values;

  ROWS_FUNCTION Run<RUN> load(unsigned row, int d) const {
    const Values from = values + size_t(row) * D + d;
    Run<RUN> run;
    ROWS_UNROLL
    for (int j = 0; j < RUN; ++j) {
      const bool inside = D % RUN == 0 || d + j < D;
      run.value[j] = inside ? static_cast<float>(from[j]) : 0.0f;
    }
    return run;
  }
};

// Rows [n, D] packed by mx.quantize(mode="affine"): 32 / BITS values in a word, the
// first in its lowest bits, and a scale and a bias for every GROUP values.
template <int D, int RUN, int BITS, int GROUP, typename Words, typename Scales>
struct PackedRows {
  Words words;
  Scales scales;
  Scales biases;

  ROWS_FUNCTION Run<RUN> load(unsigned row, int d) const {
    const size_t place = size_t(row) * D + d;
    const Words from = words + place / (32 / BITS);
    const float scale = static_cast<float>(scales[place / GROUP]);
    const float bias = static_cast<float>(biases[place / GROUP]);
    Run<RUN> run;
    ROWS_UNROLL
    for (int j = 0; j < RUN; ++j) {
      const unsigned word = from[j / (32 / BITS)] >> (j % (32 / BITS) * BITS);
      run.value[j] = scale * static_cast<float>(word & ((1u << BITS) - 1)) + bias;
    }
    return run;
  }
};

template <int D, int RUN, typename Values>
ROWS_FUNCTION FloatRows<D, RUN, Values> float_rows(Values values) {
  return {values};
}

template <int D, int RUN, int BITS, int GROUP, typename Words, typename Scales>
ROWS_FUNCTION PackedRows<D, RUN, BITS, GROUP, Words, Scales> packed_rows(
    Words words, Scales scales, Scales biases) {
  return {words, scales, biases};
}

// out [TOKENS, K] = x [TOKENS, D] · rows[ids].T, OUTPUTS ids for each group of LANES.
// Several ids share what they load of x.
template <
    int TOKENS,
    int D,
    int RUN,
    int OUTPUTS,
    typename Number,
    typename X,
    typename Rows,
    typename Ids,
    typename Out>
ROWS_FUNCTION void rows_into(
    X x, Rows rows, Ids ids, int K, Out out, unsigned lane, unsigned group) {
  const FloatRows<D, RUN, X> tokens = {x};
  const int first = group * OUTPUTS;
  if (first >= K) {
    return;  // all lanes of a group at once, so none waits for another
  }
  unsigned row[OUTPUTS];
  float sum[OUTPUTS][TOKENS];
  ROWS_UNROLL
  for (int i = 0; i < OUTPUTS; ++i) {
    // Beyond the last id it is computed again, and not written.
    row[i] = ids[first + i < K ? first + i : K - 1];
    ROWS_UNROLL
    for (int t = 0; t < TOKENS; ++t) {
      sum[i][t] = 0.0f;
    }
  }
  for (int d = lane * RUN; d < D; d += LANES * RUN) {
    ROWS_UNROLL
    for (int i = 0; i < OUTPUTS; ++i) {
      const Run<RUN> weight = rows.load(row[i], d);
      ROWS_UNROLL
      for (int t = 0; t < TOKENS; ++t) {
        const Run<RUN> token = tokens.load(t, d);
        ROWS_UNROLL
        for (int j = 0; j < RUN; ++j) {
          sum[i][t] += token.value[j] * weight.value[j];
        }
      }
    }
  }
  ROWS_UNROLL
  for (int i = 0; i < OUTPUTS; ++i) {
    ROWS_UNROLL
    for (int t = 0; t < TOKENS; ++t) {
      const float total = sum_of_lanes(sum[i][t]);
      if (lane == 0 && first + i < K) {
        out[t * K + first + i] = static_cast<Number>(total);
      }
    }
  }
}

// out [K / SPLIT, TOKENS, D]: h [TOKENS, K] · rows[ids], a sum for each SPLIT ids.
// A thread has RUN columns of it. Were the ids not divided among threads, a model's
// width alone would be too few threads for a GPU.
template <
    int TOKENS,
    int D,
    int RUN,
    int SPLIT,
    typename H,
    typename Rows,
    typename Ids,
    typename Out>
ROWS_FUNCTION void rows_out(
    H h, Rows rows, Ids ids, int K, Out out, unsigned column, unsigned part) {
  const int d = column * RUN;
  const int begin = part * SPLIT;
  if (d >= D || begin >= K) {
    return;
  }
  const int end = begin + SPLIT < K ? begin + SPLIT : K;
  float sum[TOKENS][RUN];
  ROWS_UNROLL
  for (int t = 0; t < TOKENS; ++t) {
    ROWS_UNROLL
    for (int j = 0; j < RUN; ++j) {
      sum[t][j] = 0.0f;
    }
  }
  for (int k = begin; k < end; ++k) {
    const Run<RUN> weight = rows.load(ids[k], d);
    ROWS_UNROLL
    for (int t = 0; t < TOKENS; ++t) {
      const float hidden = static_cast<float>(h[t * K + k]);
      ROWS_UNROLL
      for (int j = 0; j < RUN; ++j) {
        sum[t][j] += hidden * weight.value[j];
      }
    }
  }
  ROWS_UNROLL
  for (int t = 0; t < TOKENS; ++t) {
    const size_t start = (size_t(part) * TOKENS + t) * D + d;
    ROWS_UNROLL
    for (int j = 0; j < RUN; ++j) {
      if (D % RUN == 0 || d + j < D) {
        out[start + j] = sum[t][j];
      }
    }
  }
}

}  // namespace mlx_flash
