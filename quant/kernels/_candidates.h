/*
 * Computes with sixteen candidate scales of a group at once, one per lane: their errors, the least
 * error, and lower bounds of the errors of candidates not yet tried.
 */
EF_TARGET EF_INLINE Block EF_NAME(load)(const float *p) {
    Block b;
    for (int k = 0; k < VECTORS; k++) b.v[k] = LOAD(p + k * VW);
    return b;
}

EF_TARGET EF_INLINE Block EF_NAME(fill)(float x) {
    Block b;
    for (int k = 0; k < VECTORS; k++) b.v[k] = SET1(x);
    return b;
}

/*
 * Adds to sum the squared distance of w to its nearest step, in units of the scale; weighted, it
 * is multiplied by the magnitude of w plus an offset of the whole group.
 */
EF_TARGET EF_INLINE void EF_NAME(add_error)(float w, const Block *inverse, const Block *low,
                                            const Block *high, int clip_low, int clip_high,
                                            int weighted, float offset, Block *sum) {
    V weight = SET1(w), importance = SET1(fabsf(w) + offset);
    for (int k = 0; k < VECTORS; k++) {
        V x = MUL(weight, inverse->v[k]), error;
        if (clip_low || clip_high) {
            V q = x;
            if (clip_high) q = MIN(q, high->v[k]);
            if (clip_low) q = MAX(q, low->v[k]);
            error = SUB(x, ROUND(q));
        } else {
            error = FRACTION(x);
        }
        error = MUL(error, error);
        if (weighted) error = MUL(error, importance);
        sum->v[k] = ADD(sum->v[k], error);
    }
}

/*
 * Returns the candidates' squared errors in units of the scale. The order of summation is fixed:
 * even and odd columns are summed separately over blocks of 128 columns, then the blocks are added.
 */
EF_TARGET EF_INLINE Block EF_NAME(unit_errors)(const float *w, int64_t n, const Block *inverse,
                                               const Block *low, const Block *high, int clip_low,
                                               int clip_high, int weighted, float offset) {
    Block total = EF_NAME(fill)(0.0f);
    for (int64_t start = 0; start < n; start += SUM_COLUMNS) {
        Block even = EF_NAME(fill)(0.0f), odd = even;
        int64_t stop = n - start < SUM_COLUMNS ? n : start + SUM_COLUMNS, j = start;
        for (; j + 1 < stop; j += 2) {
            EF_NAME(add_error)(w[j], inverse, low, high, clip_low, clip_high, weighted, offset,
                               &even);
            EF_NAME(add_error)(w[j + 1], inverse, low, high, clip_low, clip_high, weighted, offset,
                               &odd);
        }
        if (j < stop)
            EF_NAME(add_error)(w[j], inverse, low, high, clip_low, clip_high, weighted, offset,
                               &even);
        for (int k = 0; k < VECTORS; k++)
            total.v[k] = ADD(total.v[k], ADD(even.v[k], odd.v[k]));
    }
    return total;
}

EF_TARGET EF_INLINE Block EF_NAME(errors)(const float *w, int64_t n, const Block *inverse,
                                          const Block *area, const Block *low, const Block *high,
                                          int clip_low, int clip_high, int weighted, float offset) {
    Block e;
    /* Weighted searches are of few bits, where nearly every candidate clips. */
    if (weighted)
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 1, 1, 1, offset);
    else if (clip_low && clip_high)
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 1, 1, 0, 0.0f);
    else if (clip_low)
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 1, 0, 0, 0.0f);
    else if (clip_high)
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 0, 1, 0, 0.0f);
    else
        e = EF_NAME(unit_errors)(w, n, inverse, low, high, 0, 0, 0, 0.0f);
    for (int k = 0; k < VECTORS; k++) e.v[k] = MUL(area->v[k], e.v[k]);
    return e;
}

/* Returns the least of the 16 lanes, and the first lane that has it. */
EF_TARGET EF_INLINE float EF_NAME(first_least)(const Block *b, int *lane) {
#if VW == 16
    float least = _mm512_reduce_min_ps(b->v[0]);
    *lane = lowest_lane(_mm512_cmp_ps_mask(b->v[0], SET1(least), _CMP_EQ_OQ));
    return least;
#else
    float e[LANES], least;
    V m = b->v[0];
    for (int k = 1; k < VECTORS; k++) m = MIN(m, b->v[k]);
    STORE(e, m);
    least = e[0];
    for (int k = 1; k < VW; k++) least = at_most(least, e[k]);
    for (int k = 0; k < VECTORS; k++) STORE(e + k * VW, b->v[k]);
    *lane = 0;
    while (e[*lane] != least) ++*lane;
    return least;
#endif
}

/* Returns a mask of the lanes where a is at most b. */
EF_TARGET EF_INLINE unsigned EF_NAME(at_most_mask)(const Block *a, const Block *b) {
#if VW == 16
    return _mm512_cmp_ps_mask(a->v[0], b->v[0], _CMP_LE_OQ);
#elif VW == 8
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a->v[0], b->v[0], _CMP_LE_OQ)) |
           (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a->v[1], b->v[1], _CMP_LE_OQ)) << 8;
#else
    float x[LANES], y[LANES];
    unsigned mask = 0;
    for (int k = 0; k < VECTORS; k++) {
        STORE(x + k * VW, a->v[k]);
        STORE(y + k * VW, b->v[k]);
    }
    for (int l = 0; l < LANES; l++) mask |= (unsigned)(x[l] <= y[l]) << l;
    return mask;
#endif
}

/* Returns the error of clipping to [low, high], a lower bound for narrower windows. */
EF_TARGET EF_INLINE float EF_NAME(clipping)(const float *w, int64_t n, float low, float high,
                                            int weighted, float offset) {
    float parts[LANES], total = 0.0f;
    Block sum = EF_NAME(fill)(0.0f);
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int k = 0; k < VECTORS; k++) {
            V x = LOAD(w + j + k * VW);
            V excess = SUB(x, MAX(MIN(x, SET1(high)), SET1(low)));
            excess = MUL(excess, excess);
            if (weighted) excess = MUL(excess, ADD(MAX(x, SUB(SET1(0.0f), x)), SET1(offset)));
            sum.v[k] = ADD(sum.v[k], excess);
        }
    for (int k = 1; k < VECTORS; k++) sum.v[0] = ADD(sum.v[0], sum.v[k]);
#if VW == 16
    (void)parts;
    total = _mm512_reduce_add_ps(sum.v[0]);
#else
    STORE(parts, sum.v[0]);
    for (int k = 0; k < VW; k++) total += parts[k];
#endif
    for (; j < n; j++) {
        float excess = w[j] - at_least(at_most(w[j], high), low);
        total += excess * excess * (weighted ? fabsf(w[j]) + offset : 1.0f);
    }
    return total;
}

/* Finds how far the group extends above zero and below it, both at least 0. */
EF_TARGET EF_INLINE void EF_NAME(range)(const float *w, int64_t n, float *positive,
                                        float *negative) {
    float high[LANES], low[LANES], most = 0.0f, least = 0.0f;
    Block highest = EF_NAME(fill)(0.0f), lowest = highest;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int k = 0; k < VECTORS; k++) {
            V x = LOAD(w + j + k * VW);
            highest.v[k] = MAX(x, highest.v[k]);
            lowest.v[k] = MIN(x, lowest.v[k]);
        }
    for (int k = 1; k < VECTORS; k++) {
        highest.v[0] = MAX(highest.v[0], highest.v[k]);
        lowest.v[0] = MIN(lowest.v[0], lowest.v[k]);
    }
#if VW == 16
    (void)high, (void)low;
    most = _mm512_reduce_max_ps(highest.v[0]);
    least = _mm512_reduce_min_ps(lowest.v[0]);
#else
    STORE(high, highest.v[0]);
    STORE(low, lowest.v[0]);
    for (int k = 0; k < VW; k++) {
        most = at_least(high[k], most);
        least = at_most(low[k], least);
    }
#endif
    for (; j < n; j++) {
        most = at_least(w[j], most);
        least = at_most(w[j], least);
    }
    *positive = most;
    *negative = -least;
}

/* Computes the reciprocals and squares of the sixteen scales with these bits. */
EF_TARGET EF_INLINE void EF_NAME(candidates)(const int *bits, Block *inverse, Block *area) {
    Lanes lanes;
    float scales[LANES];
    memcpy(&lanes, bits, sizeof lanes);
    LANES_SHIFT(lanes, lanes);
    memcpy(scales, &lanes, sizeof scales);
    for (int k = 0; k < VECTORS; k++) {
        V scale = LOAD(scales + k * VW);
        inverse->v[k] = DIV(SET1(1.0f), scale);
        area->v[k] = MUL(scale, scale);
    }
}
