// NOT COMPILED HERE: EdgeForge is made and tested without a Mac. A test checks that every function,
// input, output, state, metadata key and file that this snippet names is in an exported artifact.
//
// A Core ML artifact on an iPhone with iOS 18 or later. Drag `model.mlpackage` into the app's
// target: Xcode compiles it to model.mlmodelc. For text, add the package swift-transformers and
// the artifact's `tokenizer.json`, `tokenizer_config.json` and `config.json` as a folder:
//
//     let tokenizer = try await AutoTokenizer.from(modelFolder: folder)
//     let generator = try await Generator()
//     var made: [Int] = []
//     try generator.generate(tokenizer.encode(text: "The function returns"), limit: 48) { token in
//         made.append(token)
//         show(tokenizer.decode(tokens: made))
//     }

import CoreML
import Foundation

/// Continues a text with the likeliest tokens.
final class Generator {
    private let prefill: MLModel  // takes a whole chunk of a prompt in one call
    private let decode: MLModel  // takes one token
    private let chunks: [Int]  // how many tokens a call of prefill may take, largest first
    private let context: Int
    private let ends: Set<Int>

    init() async throws {
        guard let url = Bundle.main.url(forResource: "model", withExtension: "mlmodelc") else {
            throw CocoaError(.fileNoSuchFile)
        }
        let loaded = try await Self.load(url, function: "decode")
        decode = loaded
        prefill = try await Self.load(url, function: "prefill")
        let metadata = loaded.modelDescription.metadata[.creatorDefinedKey] as? [String: String]
        func numbers(_ key: String) -> [Int] {
            (metadata?[key] ?? "").split(separator: ",").compactMap { Int($0) }
        }
        chunks = numbers("edgeforge.prefill_tokens").sorted(by: >)
        context = numbers("edgeforge.context_length").first ?? 0
        ends = Set(numbers("edgeforge.eos_token_ids"))
    }

    private static func load(_ url: URL, function: String) async throws -> MLModel {
        let configuration = MLModelConfiguration()
        configuration.functionName = function
        // What `--profile gpu`, the default, is shaped for; .cpuAndNeuralEngine for `--profile ane`.
        configuration.computeUnits = .cpuAndGPU
        return try await MLModel.load(contentsOf: url, configuration: configuration)
    }

    /// Continues a prompt until an end token, the limit or a full context.
    func generate(_ prompt: [Int], limit: Int, emit: (Int) -> Void) throws {
        let tokens = prompt  // as the tokenizer gives them: it adds what begins a text
        guard !tokens.isEmpty, tokens.count < context else {
            throw CocoaError(.featureUnsupported)  // an empty prompt, or one that fills the context
        }
        var position = 0
        var next = 0

        // Whole chunks first: prefill takes exactly as many tokens as it was written for.
        let filled = prefill.makeState()
        while let size = chunks.first(where: { $0 <= tokens.count - position }) {
            let chunk = Array(tokens[position..<position + size])
            next = try likeliest(prefill, chunk, at: position, filled)
            position += size
        }

        // A state belongs to the function that made it, so decode gets a copy of its caches.
        let state = decode.makeState()
        for name in decode.modelDescription.stateDescriptionsByName.keys {  // "keyCache_0", ...
            filled.withMultiArray(for: name) { source in
                state.withMultiArray(for: name) { source.transfer(to: $0) }
            }
        }

        // What is left of the prompt, one token a call.
        for token in tokens[position...] {
            next = try likeliest(decode, [token], at: position, state)
            position += 1
        }

        for count in 0..<max(limit, 0) {
            if ends.contains(next) { return }
            emit(next)
            if count + 1 == limit || position == context { return }
            next = try likeliest(decode, [next], at: position, state)
            position += 1
        }
    }

    /// Appends tokens at a position of the text and returns the likeliest one to come after them.
    private func likeliest(
        _ model: MLModel, _ tokens: [Int], at position: Int, _ state: MLState
    ) throws -> Int {
        let ids = MLShapedArray<Int32>(scalars: tokens.map(Int32.init), shape: [1, tokens.count])
        let start = MLShapedArray<Int32>(scalars: [Int32(position)], shape: [1])
        let inputs = try MLDictionaryFeatureProvider(dictionary: [
            "inputIds": MLFeatureValue(shapedArray: ids),
            "position": MLFeatureValue(shapedArray: start),
        ])
        let outputs = try model.prediction(from: inputs, using: state)
        guard let logits = outputs.featureValue(for: "logits")?.shapedArrayValue(of: Float16.self)
        else { throw CocoaError(.coderValueNotFound) }
        let scores = logits.scalars  // [1, 1, vocabulary]
        return scores.indices.max { scores[$0] < scores[$1] } ?? 0
    }
}
