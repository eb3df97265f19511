/*
 * Quantizes rows whose scales are found, and dequantizes rows.
 */

/* Writes a group's codes and residuals (weight - stored value). */
EF_TARGET EF_INLINE void EF_NAME(encode)(const float *w, int64_t n, float scale, float zero,
                                         float max_code, uint8_t *codes, float *residual) {
    const float inverse = 1.0f / scale, low = -zero, high = max_code - zero;
    for (int64_t j = 0; j < n; j++) {
        float q = round_even(at_least(at_most(w[j] * inverse, high), low));
        residual[j] = w[j] - q * scale;
        codes[j] = (uint8_t)(int32_t)(q + zero);
    }
}

EF_TARGET EF_INLINE void EF_NAME(pack)(const uint8_t *codes, int64_t n, int bits, uint8_t *out) {
    if (bits == 8) {
        memcpy(out, codes, (size_t)n);
        return;
    }
    if (bits == 4) {
        for (int64_t i = 0; i < n / 2; i++)
            out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        if (n % 2) out[n / 2] = codes[n - 1];
        return;
    }
    /* Other widths are a stream of bits, the lowest bit of each byte first. */
    uint32_t held = 0;
    int count = 0;
    for (int64_t j = 0; j < n; j++) {
        held |= (uint32_t)codes[j] << count;
        for (count += bits; count >= 8; count -= 8, held >>= 8) *out++ = (uint8_t)held;
    }
    if (count) *out = (uint8_t)held;
}

/* Returns the code at an index of a stream of bits. */
EF_INLINE int EF_NAME(code_at)(const uint8_t *in, int64_t index, int bits) {
    const int64_t place = index * bits, byte = place / 8;
    const int shift = (int)(place % 8);
    int code = in[byte] >> shift;
    if (shift + bits > 8) code |= in[byte + 1] << (8 - shift);
    return code & ((1 << bits) - 1);
}

/*
 * Returns the sum of squares of a row padded with zeros: lane j sums columns j, j + 16, ..., and a
 * tree adds the lanes. The fixed order gives the same bits with every instruction set.
 */
EF_TARGET EF_INLINE double EF_NAME(sum_of_squares)(const float *row, int64_t cols) {
    double lanes[LANES] = {0.0};
    for (int64_t j = 0; j < cols; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (double)row[j + l] * (double)row[j + l];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

/* Reads a row as float32; returns whether all of its values are finite. */
EF_TARGET EF_INLINE int EF_NAME(read_row)(const void *weight, int kind, int64_t row, int64_t cols,
                                          float *values) {
    uint32_t *out = (uint32_t *)(void *)values;
    uint32_t bad = 0;
    if (kind == FLOAT32) {
        memcpy(values, (const float *)weight + row * cols, (size_t)cols * sizeof(float));
    } else if (kind == BFLOAT16) {
        const uint16_t *in = (const uint16_t *)weight + row * cols;
        for (int64_t j = 0; j < cols; j++) out[j] = (uint32_t)in[j] << 16;
    } else {
        const uint16_t *in = (const uint16_t *)weight + row * cols;
        for (int64_t j = 0; j < cols; j++) out[j] = widen_half(in[j]);
    }
    for (int64_t j = 0; j < cols; j++) bad |= (out[j] & 0x7F800000u) == 0x7F800000u;
    return !bad;
}

EF_TARGET static int64_t EF_NAME(quantize_rows)(const Task *task, const void *weight, int kind,
                                                uint8_t *codes, uint16_t *scale,
                                                uint8_t *zero_point, double *sums,
                                                Scratch *scratch) {
    const int64_t cols = task->cols, n = task->group, groups = cols / n;
    const float max_code = (float)((1 << task->bits) - 1);
    const float limit = LARGEST_SCALE * (task->symmetric ? (max_code - 1.0f) / 2.0f : max_code);
    double error = 0.0, norm = 0.0;
    Search searches[BATCH];
    for (int64_t row = 0; row < task->rows; row++) {
        if (!EF_NAME(read_row)(weight, kind, row, cols, scratch->values)) return row;
        for (int64_t begin = 0; begin < groups; begin += BATCH) {
            const int64_t left = groups - begin;
            const int batch = left < BATCH ? (int)left : BATCH;
            for (int i = 0; i < batch; i++) {
                Search *one = &searches[i];
                float reach;
                one->w = scratch->values + (begin + i) * n;
                EF_NAME(range)(one->w, n, &one->positive, &one->negative);
                reach = task->symmetric ? at_least(one->positive, one->negative)
                                        : one->positive + one->negative;
                if (!(reach <= limit)) return row;
                if (task->symmetric)
                    EF_NAME(start)(task, one, n);
                else
                    one->choice = EF_NAME(search_asymmetric)(task, one->w, n, one->positive,
                                                             one->negative);
            }
            if (task->symmetric) {
                for (int i = 0; i < batch; i++) EF_NAME(descend)(&searches[i], n);
                for (int i = 0; i < batch; i++) EF_NAME(list_near)(&searches[i]);
                for (int i = 0; i < batch; i++) EF_NAME(try_near)(&searches[i], n);
                for (int i = 0; i < batch; i++) EF_NAME(choose)(&searches[i]);
            }
            for (int i = 0; i < batch; i++) {
                const int64_t g = begin + i;
                const Choice choice = searches[i].choice;
                EF_NAME(encode)(searches[i].w, n, float_of_bits((uint32_t)choice.bits << 16),
                                choice.zero, max_code, scratch->codes + g * n,
                                scratch->residual + g * n);
                scale[row * groups + g] = (uint16_t)choice.bits;
                scratch->zeros[g] = choice.zero;
            }
        }
        EF_NAME(pack)(scratch->codes, cols, task->bits, codes + row * (cols * task->bits / 8));
        if (!task->symmetric) {
            uint8_t *points = scratch->codes; /* free again: this row's codes are packed already */
            for (int64_t g = 0; g < groups; g++) points[g] = (uint8_t)(int)scratch->zeros[g];
            EF_NAME(pack)(points, groups, task->bits,
                          zero_point + row * ((groups * task->bits + 7) / 8));
        }
        error += EF_NAME(sum_of_squares)(scratch->residual, cols);
        norm += EF_NAME(sum_of_squares)(scratch->values, cols);
    }
    sums[0] = error;
    sums[1] = norm;
    return ALL_ROWS_FINE;
}

EF_TARGET static void EF_NAME(dequantize_rows)(const Task *task, const uint8_t *codes,
                                               const uint16_t *scale, const uint8_t *zero_point,
                                               float *out) {
    const int64_t cols = task->cols, n = task->group, groups = cols / n;
    const int bits = task->bits;
    for (int64_t row = 0; row < task->rows; row++) {
        const uint8_t *row_codes = codes + row * (cols * task->bits / 8);
        const uint8_t *row_zeros = zero_point + row * ((groups * task->bits + 7) / 8);
        for (int64_t g = 0; g < groups; g++) {
            const float s = float_of_bits((uint32_t)scale[row * groups + g] << 16);
            float *o = out + row * cols + g * n;
            int zero = 1 << (bits - 1);
            if (!task->symmetric) zero = EF_NAME(code_at)(row_zeros, g, bits);
            if (bits == 4) {
                const uint8_t *in = row_codes + g * n / 2;
                for (int64_t i = 0; i < n / 2; i++) {
                    o[2 * i] = (float)((in[i] & 15) - zero) * s;
                    o[2 * i + 1] = (float)((in[i] >> 4) - zero) * s;
                }
            } else if (bits == 8) {
                const uint8_t *in = row_codes + g * n;
                for (int64_t j = 0; j < n; j++) o[j] = (float)(in[j] - zero) * s;
            } else {
                for (int64_t j = 0; j < n; j++)
                    o[j] = (float)(EF_NAME(code_at)(row_codes, g * n + j, bits) - zero) * s;
            }
        }
    }
}
