/* A plugin of qemu that counts executed arm64 instructions by class, between marks.

   The program makes a mark by calling the system call 0x5ed6e, which Linux does not have, with the
   mark's number; what was counted since the last mark is written to the file of the option `out`.
   Counts are exact for one thread; threads that run at once may lose a few.

   Debian ships no header of qemu's plugin interface (version 1): the few prototypes stand here. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*called)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t, uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, translated);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, called);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

#define SHOWN __attribute__((visibility("default")))
SHOWN int qemu_plugin_version = 1;

enum { ALL, VECTOR, MEMORY, DOT, I8MM, BF16, FP16, SVE, SME, CLASSES };
static const char *const names[CLASSES] = {"all",  "vector", "memory", "dot", "i8mm",
                                           "bf16", "fp16",   "sve",    "sme"};
static uint64_t counts[CLASSES];
static FILE *out;

static int is(uint32_t word, uint32_t mask, uint32_t value) { return (word & mask) == value; }

/* By the encodings of the Arm Architecture Reference Manual, sections C4.1 and C7.2. */
static void classify(uint32_t word, uint64_t *n) {
  n[ALL]++;
  if (is(word, 0x1e000000, 0x04000000)) n[SVE]++;
  if (is(word, 0x9e000000, 0x80000000)) n[SME]++;
  if (is(word, 0x0e000000, 0x0e000000)) n[VECTOR]++;  /* SIMD and floating point */
  if (is(word, 0x0a000000, 0x08000000)) n[MEMORY]++;  /* loads and stores */
  if (is(word, 0x9fe0fc00, 0x0e809400) ||             /* SDOT, UDOT (vector) */
      is(word, 0x9fc0f400, 0x0f80e000) ||             /* SDOT, UDOT (by element) */
      is(word, 0xffe0f800, 0x44800000))               /* SDOT, UDOT (SVE, 32 bits) */
    n[DOT]++;
  if (is(word, 0xdfe0fc00, 0x4e80a400) ||             /* SMMLA, UMMLA */
      is(word, 0xffe0fc00, 0x4e80ac00) ||             /* USMMLA */
      is(word, 0xbfe0fc00, 0x0e809c00) ||             /* USDOT (vector) */
      is(word, 0xbf40f400, 0x0f00f000) ||             /* USDOT, SUDOT (by element) */
      is(word, 0xff20fc00, 0x45009800))               /* SMMLA, UMMLA, USMMLA (SVE) */
    n[I8MM]++;
  if (is(word, 0xbfe0fc00, 0x2e40fc00) ||             /* BFDOT (vector) */
      is(word, 0xffe0fc00, 0x6e40ec00) ||             /* BFMMLA */
      is(word, 0xbfc0f400, 0x0f40f000))               /* BFDOT (by element) */
    n[BF16]++;
  if (is(word, 0x9f60c400, 0x0e400400)) n[FP16]++;    /* three of the same, half precision */
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
  uint64_t n[CLASSES] = {0};
  size_t size = qemu_plugin_tb_n_insns(block);
  (void)id;
  for (size_t at = 0; at < size; at++) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, at)), sizeof word);
    classify(word, n);
  }
  for (int each = 0; each < CLASSES; each++)
    if (n[each]) qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &counts[each], n[each]);
}

static void system_call(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t mark, uint64_t b,
                        uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  (void)id, (void)cpu, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
  if (number != 0x5ed6e || !out) return;
  fprintf(out, "%llu", (unsigned long long)mark);
  for (int each = 0; each < CLASSES; each++)
    fprintf(out, " %s=%llu", names[each], (unsigned long long)counts[each]);
  fputc('\n', out);
  fflush(out);
  memset(counts, 0, sizeof counts);
}

SHOWN int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int count, char **options) {
  (void)info;
  for (int at = 0; at < count; at++)
    if (!strncmp(options[at], "out=", 4)) out = fopen(options[at] + 4, "w");
  if (!out) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_vcpu_syscall_cb(id, system_call);
  return 0;
}
