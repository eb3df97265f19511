/*
 * Searches the scale of a group among the bfloat16 candidates, sixteen at a time.
 */

/* Computes the errors of the scales with these bits, none of which is below smallest. */
EF_TARGET EF_INLINE void EF_NAME(try_scales)(const Search *search, int64_t n, const int *bits,
                                             int smallest, float *out) {
    const float zero = search->zero;
    const Block low = EF_NAME(fill)(-zero), high = EF_NAME(fill)(zero - 1.0f);
    const float widest = 1.0f / float_of_bits((uint32_t)smallest << 16);
    int clip_low = search->negative * widest > zero + 0.5f;
    int clip_high = search->positive * widest > zero - 0.5f;
    Block inverse, area, error;
    EF_NAME(candidates)(bits, &inverse, &area);
    /* In a short group, a mispredicted branch costs more than a clamp without effect. */
    if (n <= 64) clip_low = clip_high = clip_low | clip_high;
    error = EF_NAME(errors)(search->w, n, &inverse, &area, &low, &high, clip_low, clip_high,
                            search->weighted, search->offset);
    for (int k = 0; k < VECTORS; k++) STORE(out + k * VW, error.v[k]);
}

/* Returns the bits of the smallest scale in a block of every third scale. */
EF_INLINE int EF_NAME(lowest_of_third)(const Search *search, int block) {
    return search->last - 1 - 3 * (LANES - 1) - 3 * LANES * block;
}

/*
 * The search for the scale of a symmetric group has five stages: start, descend, list_near,
 * try_near and choose.
 *
 * An error is a sum of squares over the group; a weighted one multiplies each square by the weight's
 * magnitude plus an offset, and the lengths below are then weighted alike.
 *
 * It tries every third scale, from the largest down, until clipping alone costs more than the best
 * error. A scale one step away from a tried one has codes q with |q * scale| <= |w| + error, where
 * the lengths are 2-norms over the group. By the triangle inequality its error (as a length) is
 * less than the tried one's by at most (step / scale) times |w| + error. So the search then tries
 * only those neighbours that could still win.
 */
EF_TARGET EF_INLINE void EF_NAME(try_every_third)(Search *search, int64_t n) {
    int bits[LANES];
    Lanes lanes;
    LANES_FROM(lanes, EF_NAME(lowest_of_third)(search, search->blocks));
    LANES_AT_LEAST(lanes, search->first);
    memcpy(bits, &lanes, sizeof bits);
    EF_NAME(try_scales)(search, n, bits, bits[0], search->tried[search->blocks]);
    search->blocks++;
}

EF_TARGET EF_INLINE void EF_NAME(start)(const Task *task, Search *search, int64_t n) {
    const float reach = at_least(search->positive, search->negative);
    search->first = scale_bits(reach * task->low_factor);
    search->last = scale_bits(reach * task->high_factor);
    search->zero = (float)(1 << (task->bits - 1));
    search->weighted = task->weighted;
    search->offset = OFFSET * reach;
    search->blocks = 0;
    EF_NAME(try_every_third)(search, n);
    /* Below 8 bits nearly every search needs the second block, so it is tried without a test. */
    if (task->bits < 8) EF_NAME(try_every_third)(search, n);
}

EF_TARGET EF_INLINE float EF_NAME(least_of)(const float *errors) {
    Block block = EF_NAME(load)(errors);
    int lane;
    return EF_NAME(first_least)(&block, &lane);
}

EF_TARGET EF_INLINE void EF_NAME(descend)(Search *search, int64_t n) {
    const float zero = search->zero;
    float best = EF_NAME(least_of)(search->tried[0]);
    if (search->blocks == 2) best = at_most(EF_NAME(least_of)(search->tried[1]), best);
    while (search->blocks < MAX_BLOCKS) {
        const int above = search->last - 3 * LANES * search->blocks; /* larger scales are decided */
        float scale;
        if (above < search->first) break;
        scale = float_of_bits((uint32_t)above << 16);
        if (EF_NAME(clipping)(search->w, n, -zero * scale, (zero - 1.0f) * scale,
                              search->weighted, search->offset) > best * SURE)
            break;
        EF_NAME(try_every_third)(search, n);
        best = at_most(EF_NAME(least_of)(search->tried[search->blocks - 1]), best);
    }
    search->best = best;
    search->length = sqrtf(EF_NAME(clipping)(search->w, n, 0.0f, 0.0f, search->weighted,
                                            search->offset));
}

/* Appends the masked ones of the numbers bottom, bottom + 3, ..., except those below first. */
EF_TARGET EF_INLINE int EF_NAME(append)(int *list, int count, unsigned mask, int bottom,
                                        int first) {
#if VW == 16
    const __m512i third =
        _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
    const __m512i bits = _mm512_add_epi32(third, _mm512_set1_epi32(bottom));
    mask &= _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(first));
    _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32((__mmask16)mask, bits));
    return count + __builtin_popcount(mask);
#else
    while (mask) {
        const int bits = bottom + 3 * lowest_lane(mask);
        mask &= mask - 1;
        list[count] = bits;
        count += bits >= first;
    }
    return count;
#endif
}

/* Lists the neighbours of tried scales whose errors could be less than the best error. */
EF_TARGET EF_INLINE void EF_NAME(list_near)(Search *search) {
    const float best_length = sqrtf(search->best);
    const float near_length = (search->length + best_length) * SURE;
    const int first = search->first, last = search->last;
    int *near_bits = search->near_bits, count = 0, plus;
    unsigned masks[MAX_BLOCKS];
    for (int block = search->blocks - 1; block >= 0; block--) {
        const int bottom = EF_NAME(lowest_of_third)(search, block);
        float powers[LANES], scales[LANES];
        unsigned could_win;
        Block error = EF_NAME(load)(search->tried[block]), bound;
        Lanes bits, power;
        LANES_FROM(bits, bottom);
        LANES_AT_LEAST(bits, first);
        LANES_SHIFT(bits, bits);
        LANES_AND(power, bits, 0x7F800000);
        memcpy(scales, &bits, sizeof scales);
        memcpy(powers, &power, sizeof powers);
        for (int k = 0; k < VECTORS; k++) {
            V step = MUL(LOAD(powers + k * VW), SET1(STEP * near_length));
            V reachable = ADD(SET1(best_length), DIV(step, LOAD(scales + k * VW)));
            bound.v[k] = MUL(MUL(reachable, reachable), SET1(SURE));
        }
        could_win = EF_NAME(at_most_mask)(&error, &bound);
        /* Lanes below first were clamped to it: their neighbours are tried or out of range. */
        if (bottom < first) {
            const int below = (first - bottom + 2) / 3;
            could_win = below < LANES ? could_win & ~0u << below : 0u;
        }
        count = EF_NAME(append)(near_bits, count, could_win, bottom - 1, first);
        masks[block] = could_win;
    }
    search->smallest = near_bits[0];
    plus = count;
    for (int block = search->blocks - 1; block >= 0; block--)
        count = EF_NAME(append)(near_bits, count, masks[block],
                                EF_NAME(lowest_of_third)(search, block) + 1, first);
    if (plus == 0 || (count > plus && near_bits[plus] < near_bits[0]))
        search->smallest = near_bits[plus];
    for (int l = 0; l < LANES - 1; l++) near_bits[count + l] = last;
    search->count = count;
}

EF_TARGET EF_INLINE void EF_NAME(try_near)(Search *search, int64_t n) {
    for (int start = 0; start < search->count; start += LANES)
        EF_NAME(try_scales)(search, n, search->near_bits + start, search->smallest,
                            search->near_errors[start / LANES]);
}

/* Chooses the scale of least error; of equal errors, the smaller scale wins. */
EF_TARGET EF_INLINE void EF_NAME(choose)(Search *search) {
    const int blocks = (search->count + LANES - 1) / LANES;
    float best = search->best;
    int chosen = MAX_SCALE_BITS;
    Block least;
    for (int block = 0; block < blocks; block++)
        best = at_most(EF_NAME(least_of)(search->near_errors[block]), best);
    least = EF_NAME(fill)(best);
    for (int block = 0; block < search->blocks; block++) {
        Block error = EF_NAME(load)(search->tried[block]);
        unsigned winners = EF_NAME(at_most_mask)(&error, &least);
        int bits = EF_NAME(lowest_of_third)(search, block) + 3 * lowest_lane(winners | 1u << 31);
        bits = bits < search->first ? search->first : bits;
        chosen = (winners != 0) & (bits < chosen) ? bits : chosen;
    }
    for (int block = 0; block < blocks; block++) {
        Block error = EF_NAME(load)(search->near_errors[block]);
        unsigned winners = EF_NAME(at_most_mask)(&error, &least);
        for (; winners; winners &= winners - 1) {
            int bits = search->near_bits[block * LANES + lowest_lane(winners)];
            chosen = bits < chosen ? bits : chosen;
        }
    }
    search->choice.bits = chosen;
    search->choice.zero = search->zero;
}

/*
 * Searches the scale and zero point of an asymmetric group: sixteen scales at a time, from the
 * largest down, each with the zero points that clip no more than needed.
 */
EF_TARGET EF_INLINE Choice EF_NAME(search_asymmetric)(const Task *task, const float *w, int64_t n,
                                                      float positive, float negative) {
    const float steps = (float)((1 << task->bits) - 1);
    const float reach = positive + negative;
    const int weighted = task->weighted;
    const float offset = OFFSET * at_least(positive, negative);
    const float above = positive + offset, below = negative + offset;
    /* The least that two errors can cost at the two ends, over the square of their sum. */
    const float both_ends = !weighted ? 0.5f : reach > 0.0f ? above * below / (above + below) : 0.0f;
    const int first = scale_bits(reach * task->low_factor), every = task->bits < 8;
    const V none = SET1(0.0f), all = SET1(steps);
    float best = float_of_bits(0x7F800000u);
    int top = scale_bits(reach * task->high_factor);
    Choice choice = {MAX_SCALE_BITS + 1, 0.0f};
    for (;;) {
        const float scale = float_of_bits((uint32_t)top << 16);
        float excess, lowest, highest;
        int bits[LANES], unused, trials;
        Block inverse, area, from, to, negated;
        for (int l = 0; l < LANES; l++) {
            int b = top - (LANES - 1) + l;
            bits[l] = b < first ? first : b;
        }
        EF_NAME(candidates)(bits, &inverse, &area);
        for (int k = 0; k < VECTORS; k++) {
            V above = SUB(all, ROUND(MUL(SET1(positive), inverse.v[k])));
            to.v[k] = MIN(MAX(ROUND(MUL(SET1(negative), inverse.v[k])), none), all);
            from.v[k] = MIN(MIN(MAX(above, none), all), to.v[k]);
            negated.v[k] = SUB(none, to.v[k]);
        }
        lowest = EF_NAME(first_least)(&from, &unused);
        highest = -EF_NAME(first_least)(&negated, &unused);
        trials = every ? (int)(highest - lowest) + 1 : 3;
        for (int trial = 0; trial < trials; trial++) {
            const float z = lowest + (float)trial;
            float zeros[LANES], least, widest;
            int lane, better, clip_low = 1, clip_high = 1;
            Block low, high, error;
            if (every) {
                if (EF_NAME(clipping)(w, n, -z * scale, (steps - z) * scale, weighted,
                                      offset) >
                    best * SURE)
                    continue;
                widest = 1.0f / float_of_bits((uint32_t)bits[0] << 16);
                clip_low = negative * widest > z + 0.5f;
                clip_high = positive * widest > (steps - z) + 0.5f;
                if (n <= 64) clip_low = clip_high = clip_low | clip_high;
            }
            for (int k = 0; k < VECTORS; k++) {
                V zero = SET1(z);
                if (!every) { /* the lower end, the middle rounded down, the upper end */
                    V way = MUL(SUB(to.v[k], from.v[k]), SET1(0.5f * (float)trial));
                    zero = ADD(from.v[k], ROUND(SUB(way, SET1(0.25f))));
                }
                STORE(zeros + k * VW, zero);
                low.v[k] = SUB(none, zero);
                high.v[k] = SUB(all, zero);
            }
            error = EF_NAME(errors)(w, n, &inverse, &area, &low, &high, clip_low, clip_high,
                                    weighted, offset);
            if (every)
                for (int k = 0; k < VECTORS; k++) { /* exclude zero points meant for other lanes */
                    V outside = MAX(SUB(from.v[k], SET1(z)), SUB(SET1(z), to.v[k]));
                    V penalty = MUL(MAX(outside, none), SET1(1e38f));
                    error.v[k] = ADD(error.v[k], penalty);
                }
            least = EF_NAME(first_least)(&error, &lane);
            /* Of equal errors the smaller scale wins, then the smaller zero point. */
            better = (least < best) | ((least == best) & (bits[lane] < choice.bits)) |
                     ((least == best) & (bits[lane] == choice.bits) & (zeros[lane] < choice.zero));
            choice.bits = better ? bits[lane] : choice.bits;
            choice.zero = better ? zeros[lane] : choice.zero;
            best = better ? least : best;
        }
        top -= LANES;
        if (top < first) break;
        /*
         * With any zero point, the lengths clipped at both ends add up to at least this excess, so
         * the errors of the two outermost values cost at least half its square; weighted, by a and
         * b, at least a * b / (a + b) times its square.
         */
        excess = reach - steps * float_of_bits((uint32_t)top << 16);
        if (excess > 0.0f && excess * excess * both_ends > best * SURE) break;
    }
    return choice;
}
