// Greedy tokens behind a prompt, by the C interface of onnxruntime-genai: FOLDER TOKENS PROMPT.
// The wheel has its library without its headers, so what is used of it is declared here (as in ort_genai_c.h of 0.18).
#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" {
struct OgaResult;
struct OgaModel;
struct OgaTokenizer;
struct OgaSequences;
struct OgaGeneratorParams;
struct OgaGenerator;
const char* OgaResultGetError(const OgaResult*);
OgaResult* OgaCreateModel(const char* folder, OgaModel** out);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer** out);
OgaResult* OgaCreateSequences(OgaSequences** out);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char* text, OgaSequences*);
OgaResult* OgaTokenizerDecode(const OgaTokenizer*, const int32_t* tokens, size_t count, const char** out);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams** out);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double value);
OgaResult* OgaGeneratorParamsSetSearchBool(OgaGeneratorParams*, const char* name, bool value);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator** out);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
size_t OgaGenerator_GetSequenceCount(const OgaGenerator*, size_t index);
const int32_t* OgaGenerator_GetSequenceData(const OgaGenerator*, size_t index);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t index);
void OgaDestroyString(const char*);
void OgaDestroySequences(OgaSequences*);
void OgaDestroyGenerator(OgaGenerator*);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroyTokenizer(OgaTokenizer*);
void OgaDestroyModel(OgaModel*);
void OgaShutdown(void);
}

static void check(OgaResult* result) {
    if (result != nullptr) {
        std::fprintf(stderr, "%s\n", OgaResultGetError(result));
        std::exit(1);
    }
}

int main(int count, char** arguments) {
    if (count != 4) return 2;
    OgaModel* model = nullptr;
    OgaTokenizer* tokenizer = nullptr;
    OgaSequences* prompt = nullptr;
    OgaGeneratorParams* params = nullptr;
    OgaGenerator* generator = nullptr;
    check(OgaCreateModel(arguments[1], &model));
    check(OgaCreateTokenizer(model, &tokenizer));
    check(OgaCreateSequences(&prompt));
    check(OgaTokenizerEncode(tokenizer, arguments[3], prompt));
    check(OgaCreateGeneratorParams(model, &params));
    check(OgaGeneratorParamsSetSearchNumber(params, "max_length", 64));
    check(OgaGeneratorParamsSetSearchBool(params, "do_sample", false));
    check(OgaCreateGenerator(model, params, &generator));
    check(OgaGenerator_AppendTokenSequences(generator, prompt));
    for (int step = std::atoi(arguments[2]); step > 0; --step) check(OgaGenerator_GenerateNextToken(generator));
    const size_t length = OgaGenerator_GetSequenceCount(generator, 0);
    const int32_t* tokens = OgaGenerator_GetSequenceData(generator, 0);
    for (size_t i = OgaSequencesGetSequenceCount(prompt, 0); i < length; ++i) std::printf("%d ", tokens[i]);
    std::printf("\n");
    OgaDestroyGenerator(generator);
    OgaDestroyGeneratorParams(params);
    OgaDestroySequences(prompt);
    OgaDestroyTokenizer(tokenizer);
    OgaDestroyModel(model);
    OgaShutdown();
    return 0;
}
