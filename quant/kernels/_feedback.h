/*
 * Rounds columns one after the other; each first adds its shares of earlier columns' errors.
 * quant/quantizers/grids.py does the same arithmetic in torch and must give the same bits.
 *
 * All columns of one strip of rows are rounded before the next strip, so that the strip's errors
 * stay in the first-level cache.
 */

/* A full strip's floats, in place; a short strip is copied to `room` and padded. */
EF_TARGET EF_INLINE const float *EF_NAME(whole_strip)(const float *from, int64_t lanes, float pad,
                                                      float *room) {
    if (lanes == STRIP) return from;
    for (int l = 0; l < STRIP; l++) room[l] = l < lanes ? from[l] : pad;
    return room;
}

/* Writes codes and stored values of a strip of one column, on the integer grid of each row. */
EF_TARGET EF_INLINE void EF_NAME(nearest_integers)(const Column *column, int64_t lanes,
                                                   const float *wanted, float *codes,
                                                   float *values) {
    float scale_room[STRIP], zero_room[STRIP];
    const float *scales = EF_NAME(whole_strip)(column->scale, lanes, 1.0f, scale_room);
    const float *zeros = EF_NAME(whole_strip)(column->zero, lanes, 0.0f, zero_room);
    for (int l = 0; l < STRIP; l += VW) {
        V scale = LOAD(scales + l), zero = LOAD(zeros + l), steps = DIV(LOAD(wanted + l), scale);
        V low = SUB(SET1(0.0f), zero), high = SUB(SET1(column->max_code), zero);
        steps = ROUND(MAX(MIN(steps, high), low));
        STORE(codes + l, ADD(steps, zero));
        STORE(values + l, MUL(steps, scale));
    }
}

/* The same for tables: takes the nearest entry of each row's table; of two as near, the lower. */
EF_INLINE void EF_NAME(nearest_entries)(const Tables *tables, int64_t row, int64_t lanes,
                                        const float *wanted, float *codes, float *values) {
    for (int64_t l = 0; l < lanes; l++) {
        const int64_t table = (row + l) / tables->rows, entries = tables->entries;
        const float *edges = tables->edges + table * (entries - 1);
        int64_t code = 0;
        for (int64_t half = entries / 2; half > 0; half /= 2)
            code += edges[code + half - 1] < wanted[l] ? half : 0;
        codes[l] = (float)code;
        values[l] = tables->values[table * entries + code];
    }
}

EF_TARGET static void EF_NAME(round_columns)(const Rounding *task, const Tables *tables,
                                             float *errors) {
    for (int64_t row = 0; row < task->rows; row += STRIP) {
        const int64_t left = task->rows - row, lanes = left < STRIP ? left : STRIP;
        for (int64_t i = 0; i < task->cols; i++) {
            const int64_t place = task->places[i], at = i * task->rows + row;
            const float *shares = task->shares + i * task->stride;
            float room[STRIP], wanted[STRIP], codes[STRIP] = {0.0f}, values[STRIP] = {0.0f};
            const float *from = EF_NAME(whole_strip)(task->wanted + at, lanes, 0.0f, room);
            uint8_t *out = task->codes + place * task->rows + row;
            V sum[STRIP / VW];
            for (int k = 0; k < STRIP / VW; k++) sum[k] = LOAD(from + k * VW);
            for (int64_t j = 0; j < i; j++) {
                V share = SET1(shares[j]);
                for (int k = 0; k < STRIP / VW; k++)
                    sum[k] = ADD(sum[k], MUL(share, LOAD(errors + j * STRIP + k * VW)));
            }
            for (int k = 0; k < STRIP / VW; k++) STORE(wanted + k * VW, sum[k]);
            if (tables->values == NULL) {
                const int64_t grid = place / task->group * task->rows + row;
                const Column column = {task->scale + grid, task->zero + grid, task->max_code};
                EF_NAME(nearest_integers)(&column, lanes, wanted, codes, values);
            } else {
                EF_NAME(nearest_entries)(tables, row, lanes, wanted, codes, values);
            }
            from = EF_NAME(whole_strip)(task->weight + at, lanes, 0.0f, room);
            for (int l = 0; l < STRIP; l++) errors[i * STRIP + l] = from[l] - values[l];
            for (int64_t l = 0; l < lanes; l++) out[l] = (uint8_t)(int32_t)codes[l];
            memcpy(task->errors + at, errors + i * STRIP, (size_t)lanes * sizeof(float));
        }
    }
}
