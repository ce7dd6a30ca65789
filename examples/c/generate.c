/* Generate tokens greedily with a bundle of cushion-deploy, through the C API of ONNX Runtime alone.
 *
 * Reads model.onnx, genai_config.json (end tokens, context) and export.json (form of the cache) of the bundle, feeds
 * token ids, and prints the ids that follow, as `cushion-deploy generate --json` lists them. The prefix is in the graph.
 *
 * Exit codes: 0 done, 1 logits are not finite or no memory is left, 2 bad input, 3 the library is too old,
 * 4 not a bundle, or a damaged one.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <onnxruntime_c_api.h>

enum { FAILED = 1, BAD_INPUT = 2, TOO_OLD = 3, BAD_BUNDLE = 4 };
enum {
  API = 12,           /* the oldest version of the C API with every function used here: ONNX Runtime 1.12 */
  CHUNK = 128,        /* most prompt tokens in one call, as in cushion-deploy: less work is masked away */
  MAX_ENDS = 64,      /* end tokens of a model */
  DEEPEST = 64,       /* nesting of a JSON file */
  LARGEST = 1 << 24,  /* bytes of a JSON file */
  NAME = 64           /* bytes of the name of an input or output */
};

static const OrtApi *ort;

static void fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));

static void fail(int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("error: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  exit(code);
}

/* End with the message of ONNX Runtime if a call failed. */
static void check(OrtStatus *status, const char *what) {
  if (status) fail(BAD_BUNDLE, "%s: %s", what, ort->GetErrorMessage(status));
}

static void *allocate(size_t count, size_t size) __attribute__((returns_nonnull));

static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count ? count : 1, size);
  if (!memory) fail(FAILED, "no memory is left for %zu bytes", count * size);
  return memory;
}

/* ---- the few values that are read from JSON files ---- */

static char *join(const char *folder, const char *name) {
  size_t size = strlen(folder) + strlen(name) + 2;
  char *path = allocate(size, 1);
  snprintf(path, size, "%s/%s", folder, name);
  return path;
}

static const char *skip_space(const char *at) { return at + strspn(at, " \t\r\n"); }

static const char *skip_string(const char *at) {
  for (at++; *at && *at != '"'; at++)
    if (*at == '\\' && !*++at) return NULL;
  return *at ? at + 1 : NULL;
}

/* Return the end of the JSON value at a position; NULL if it is cut off or nested too deeply. */
static const char *skip_value(const char *at, int depth) {
  at = skip_space(at);
  if (*at == '"') return skip_string(at);
  if (*at != '{' && *at != '[') {
    size_t length = strcspn(at, ",]} \t\r\n");
    return length ? at + length : NULL;
  }
  if (depth > DEEPEST) return NULL;
  for (at = skip_space(at + 1); *at != '}' && *at != ']'; at = skip_space(at)) {
    if (*at == ',' || *at == ':') at++;
    else if (!(at = skip_value(at, depth + 1))) return NULL;
  }
  return at + 1;
}

/* Read a file that is one JSON value, complete. */
static char *read_json(const char *folder, const char *name) {
  char *path = join(folder, name);
  FILE *file = fopen(path, "rb");
  if (!file) fail(BAD_INPUT, "cannot read %s: %s; give the folder of a bundle", path, strerror(errno));
  char *text = allocate(LARGEST + 1, 1);
  size_t length = fread(text, 1, LARGEST, file);
  if (ferror(file)) fail(BAD_INPUT, "cannot read %s: %s", path, strerror(errno));
  if (length == LARGEST) fail(BAD_BUNDLE, "%s has %d bytes or more", path, LARGEST);
  const char *end = skip_value(text, 0);
  if (!end || *skip_space(end)) fail(BAD_BUNDLE, "%s is not a JSON file, or is cut off", path);
  fclose(file);
  free(path);
  return text;
}

/* Return the value of a key in the JSON object at a position; NULL if there is none. */
static const char *find(const char *at, const char *key) {
  size_t length = strlen(key);
  at = at ? skip_space(at) : NULL;
  if (!at || *at != '{') return NULL;
  for (at = skip_space(at + 1); *at == '"';) {
    const char *name = at + 1, *end = skip_string(at);
    if (!end || *(at = skip_space(end)) != ':') return NULL;
    at = skip_space(at + 1);
    if ((size_t)(end - 1 - name) == length && !memcmp(name, key, length)) return at;
    if (!(at = skip_value(at, 0))) return NULL;
    at = skip_space(at);
    if (*at == ',') at = skip_space(at + 1);
  }
  return NULL;
}

/* Read one integer or a list of them; return how many, or -1 if a value is no integer or there are more than `most`. */
static int integers(const char *at, int64_t *values, int most) {
  int count = 0, list;
  if (!at) return -1;
  list = *at == '[';
  if (list) at = skip_space(at + 1);
  while (!list || *at != ']') {
    char *end;
    errno = 0;
    long long value = strtoll(at, &end, 10);
    if (end == at || errno || count == most) return -1;
    values[count++] = value;
    at = skip_space(end);
    if (!list) break;
    if (*at == ',') at = skip_space(at + 1);
    else if (*at != ']') return -1;
  }
  return count;
}

/* ---- the model ---- */

typedef struct {
  OrtEnv *env;
  OrtSession *session;
  OrtMemoryInfo *memory;
  size_t caches;             /* keys and values of all layers */
  char (*past)[NAME];        /* names of the inputs that take them */
  char (*present)[NAME];     /* names of the outputs that return them */
  OrtValue **cache;          /* [1, kv_heads, length, head_dim] each */
  int64_t length, vocab;     /* tokens in the cache; tokens that the model knows */
  int64_t context, ends[MAX_ENDS];
  int end_count, has_start;  /* has_start: the head can be computed from a token on */
} Model;

/* Read what the graph does not say: end tokens, context, and whether the prefix is in the graph. */
static void read_description(Model *model, const char *bundle) {
  char *export = read_json(bundle, "export.json"), *genai = read_json(bundle, "genai_config.json");
  const char *in_cache = find(find(export, "contract"), "prefix_in_cache"), *described = find(genai, "model");
  if (!in_cache) fail(BAD_BUNDLE, "%s/export.json does not describe a graph", bundle);
  if (!strncmp(in_cache, "true", 4))
    fail(BAD_BUNDLE, "the prefix of %s is not in its graph; build it with export.prefix=baked", bundle);
  model->end_count = integers(find(described, "eos_token_id"), model->ends, MAX_ENDS);
  if (model->end_count < 0 || integers(find(described, "context_length"), &model->context, 1) != 1)
    fail(BAD_BUNDLE, "%s/genai_config.json has no eos_token_id or context_length", bundle);
  free(export);
  free(genai);
}

static OrtValue *tensor(Model *model, int64_t *values, int64_t *shape, size_t rank) {
  OrtValue *value = NULL;
  size_t bytes = sizeof *values;
  for (size_t i = 0; i < rank; i++) bytes *= (size_t)shape[i];
  check(ort->CreateTensorWithDataAsOrtValue(model->memory, values, bytes, shape, rank,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value), "input");
  return value;
}

/* Read type and shape of an input or output; return its rank, at most 4. */
static size_t describe(OrtTypeInfo *info, ONNXTensorElementDataType *type, int64_t shape[4]) {
  const OrtTensorTypeAndShapeInfo *details = NULL;
  size_t rank = 0;
  check(ort->CastTypeInfoToTensorInfo(info, &details), "graph");
  if (!details) fail(BAD_BUNDLE, "the graph has an input or output that is not a tensor");
  check(ort->GetTensorElementType(details, type), "graph");
  check(ort->GetDimensionsCount(details, &rank), "graph");
  if (rank > 4) fail(BAD_BUNDLE, "the graph has a tensor with %zu dimensions", rank);
  check(ort->GetDimensions(details, shape, rank), "graph");
  ort->ReleaseTypeInfo(info);
  return rank;
}

/* Find the caches among the inputs of the graph, and create each one empty. */
static void open_caches(Model *model) {
  OrtAllocator *allocator = NULL;
  size_t inputs = 0;
  check(ort->GetAllocatorWithDefaultOptions(&allocator), "allocator");
  check(ort->SessionGetInputCount(model->session, &inputs), "graph");
  model->past = allocate(inputs, NAME);
  model->present = allocate(inputs, NAME);
  model->cache = allocate(inputs, sizeof *model->cache);
  for (size_t i = 0; i < inputs; i++) {
    static const char prefix[] = "past_key_values";
    OrtTypeInfo *info = NULL;
    ONNXTensorElementDataType type;
    int64_t shape[4] = {0};
    char *name = NULL;
    check(ort->SessionGetInputName(model->session, i, allocator, &name), "graph");
    if (!strncmp(name, prefix, sizeof prefix - 1)) {
      size_t n = model->caches++;
      int fits = snprintf(model->past[n], NAME, "%s", name) < NAME;
      snprintf(model->present[n], NAME, "present%.*s", NAME - 8, name + sizeof prefix - 1);
      check(ort->SessionGetInputTypeInfo(model->session, i, &info), "graph");
      if (describe(info, &type, shape) != 4 || shape[1] < 1 || shape[3] < 1 || !fits)
        fail(BAD_BUNDLE, "%s is not a cache [batch, kv_heads, past, head_dim]", name);
      shape[0] = 1, shape[2] = 0;
      check(ort->CreateTensorAsOrtValue(allocator, shape, 4, type, &model->cache[n]), name);
    }
    check(ort->AllocatorFree(allocator, name), "allocator");
  }
  if (!model->caches) fail(BAD_BUNDLE, "the graph has no inputs past_key_values.N.key and .value");
}

/* Find the size of the vocabulary, and whether the head can skip tokens whose logits nobody wants. */
static void read_outputs(Model *model) {
  OrtAllocator *allocator = NULL;
  size_t outputs = 0, overridable = 0;
  check(ort->GetAllocatorWithDefaultOptions(&allocator), "allocator");
  check(ort->SessionGetOutputCount(model->session, &outputs), "graph");
  for (size_t i = 0; i < outputs; i++) {
    OrtTypeInfo *info = NULL;
    ONNXTensorElementDataType type;
    int64_t shape[4] = {0};
    char *name = NULL;
    check(ort->SessionGetOutputName(model->session, i, allocator, &name), "graph");
    check(ort->SessionGetOutputTypeInfo(model->session, i, &info), "graph");
    if (describe(info, &type, shape) == 3 && !strcmp(name, "logits") && type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
      model->vocab = shape[2];
    check(ort->AllocatorFree(allocator, name), "allocator");
  }
  if (model->vocab < 1) fail(BAD_BUNDLE, "the graph has no float32 output logits [batch, sequence, vocab]");
  check(ort->SessionGetOverridableInitializerCount(model->session, &overridable), "graph");
  for (size_t i = 0; i < overridable; i++) {
    char *name = NULL;
    check(ort->SessionGetOverridableInitializerName(model->session, i, allocator, &name), "graph");
    model->has_start |= !strcmp(name, "logits_start");
    check(ort->AllocatorFree(allocator, name), "allocator");
  }
}

static void open_model(Model *model, const char *bundle, int threads, int fast) {
  OrtSessionOptions *options = NULL;
  char *path = join(bundle, "model.onnx");
  if (access(path, R_OK)) fail(BAD_INPUT, "cannot read %s: %s; give the folder of a bundle", path, strerror(errno));
  read_description(model, bundle);
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "generate", &model->env), "ONNX Runtime");
  check(ort->CreateSessionOptions(&options), "options");
  if (threads) check(ort->SetIntraOpNumThreads(options, threads), "options");
  /* Softmax over masked positions produces subnormal numbers, which take up to 30 times as long. */
  check(ort->AddSessionConfigEntry(options, "session.set_denormal_as_zero", "1"), "options");
  /* Exact on every processor; see README.md before you change it. */
  check(ort->AddSessionConfigEntry(options, "session.x64quantprecision", fast ? "0" : "1"), "options");
  check(ort->CreateSession(model->env, path, options, &model->session), path);
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &model->memory), "memory");
  ort->ReleaseSessionOptions(options);
  free(path);
  open_caches(model);
  read_outputs(model);
}

/* Feed tokens behind those in the cache; return the token with the largest logit behind the last one. */
static int64_t feed(Model *model, int64_t *ids, int64_t count) {
  int64_t total = model->length + count, start = count - 1, best = 0;
  int64_t *mask = allocate((size_t)total, sizeof *mask), *positions = allocate((size_t)count, sizeof *positions);
  for (int64_t i = 0; i < total; i++) mask[i] = 1;
  for (int64_t i = 0; i < count; i++) positions[i] = model->length + i;

  size_t inputs = 3 + (size_t)model->has_start, n = model->caches;
  const char **in_names = allocate(inputs + n, sizeof *in_names), **out_names = allocate(1 + n, sizeof *out_names);
  OrtValue **in = allocate(inputs + n, sizeof *in), **out = allocate(1 + n, sizeof *out);
  in_names[0] = "input_ids", in_names[1] = "attention_mask", in_names[2] = "position_ids";
  in[0] = tensor(model, ids, (int64_t[]){1, count}, 2);
  in[1] = tensor(model, mask, (int64_t[]){1, total}, 2);
  in[2] = tensor(model, positions, (int64_t[]){1, count}, 2);
  if (model->has_start) in_names[3] = "logits_start", in[3] = tensor(model, &start, (int64_t[]){1}, 1);
  out_names[0] = "logits";
  for (size_t i = 0; i < n; i++) {
    in_names[inputs + i] = model->past[i], in[inputs + i] = model->cache[i];
    out_names[1 + i] = model->present[i];
  }
  check(ort->Run(model->session, NULL, in_names, (const OrtValue *const *)in, inputs + n, out_names, 1 + n, out),
        "ONNX Runtime");

  OrtTensorTypeAndShapeInfo *info = NULL;
  size_t elements = 0;
  float *logits = NULL;
  check(ort->GetTensorTypeAndShape(out[0], &info), "logits");
  check(ort->GetTensorShapeElementCount(info, &elements), "logits");
  check(ort->GetTensorMutableData(out[0], (void **)&logits), "logits");
  if (elements < (size_t)model->vocab) fail(BAD_BUNDLE, "the graph returned %zu logits", elements);
  logits += elements - (size_t)model->vocab;
  for (int64_t i = 0; i < model->vocab; i++) {
    if (!isfinite(logits[i])) fail(FAILED, "the logit of token %lld is not finite", (long long)i);
    if (logits[i] > logits[best]) best = i;
  }

  ort->ReleaseTensorTypeAndShapeInfo(info);
  ort->ReleaseValue(out[0]);
  for (size_t i = 0; i < inputs + n; i++) ort->ReleaseValue(in[i]);
  for (size_t i = 0; i < n; i++) model->cache[i] = out[1 + i];
  model->length = total;
  free(in), free(out), free(in_names), free(out_names), free(mask), free(positions);
  return best;
}

static int is_end(const Model *model, int64_t token) {
  for (int i = 0; i < model->end_count; i++)
    if (model->ends[i] == token) return 1;
  return 0;
}

static void close_model(Model *model) {
  for (size_t i = 0; i < model->caches; i++) ort->ReleaseValue(model->cache[i]);
  ort->ReleaseMemoryInfo(model->memory);
  ort->ReleaseSession(model->session);
  ort->ReleaseEnv(model->env);
  free(model->cache), free(model->past), free(model->present);
}

/* ---- the command line ---- */

static int64_t number(const char *text, const char *what, int64_t least, int64_t most) {
  char *end;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (end == text || *end || errno || value < least || value > most)
    fail(BAD_INPUT, "%s is '%s', expected %lld to %lld", what, text, (long long)least, (long long)most);
  return value;
}

static const char usage[] =
    "usage: generate [-n TOKENS] [-t THREADS] [-f] BUNDLE ID...\n"
    "  -n  most tokens to generate (default 128)\n"
    "  -t  threads of an operator (default: one per core)\n"
    "  -f  fast integer kernels: only for processors on which they are exact (see README.md)\n";

int main(int count, char **arguments) {
  int threads = 0, fast = 0, option;
  int64_t wanted = 128;
  while ((option = getopt(count, arguments, "+n:t:fh")) != -1) {
    if (option == 'n') wanted = number(optarg, "the number of tokens", 1, INT32_MAX);
    else if (option == 't') threads = (int)number(optarg, "the number of threads", 1, 1024);
    else if (option == 'f') fast = 1;
    else return fputs(usage, option == 'h' ? stdout : stderr), option == 'h' ? 0 : BAD_INPUT;
  }
  if (count - optind < 2) return fputs(usage, stderr), BAD_INPUT;
  const OrtApiBase *base = OrtGetApiBase();
  if (!(ort = base->GetApi(API))) fail(TOO_OLD, "ONNX Runtime %s is older than 1.%d", base->GetVersionString(), API);

  Model model = {0};
  open_model(&model, arguments[optind++], threads, fast);
  int64_t prompt = count - optind, token = 0;
  if (prompt + wanted > model.context)
    fail(BAD_INPUT, "%lld prompt tokens and %lld new ones are more than the %lld that the model has positions for",
         (long long)prompt, (long long)wanted, (long long)model.context);
  int64_t *ids = allocate((size_t)prompt, sizeof *ids);
  for (int64_t i = 0; i < prompt; i++) ids[i] = number(arguments[optind + i], "a token id", 0, model.vocab - 1);

  for (int64_t begin = 0; begin < prompt; begin += CHUNK)
    token = feed(&model, ids + begin, prompt - begin < CHUNK ? prompt - begin : CHUNK);
  for (int64_t made = 1;; made++) {
    printf(made > 1 ? " %lld" : "%lld", (long long)token);
    fflush(stdout);
    if (made == wanted || is_end(&model, token)) break;
    token = feed(&model, &token, 1);
  }
  printf("\n");
  free(ids);
  close_model(&model);
  if (fflush(stdout) || ferror(stdout)) fail(BAD_INPUT, "cannot write the tokens: %s", strerror(errno));
  return 0;
}
