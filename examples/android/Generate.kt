// NOT COMPILED HERE: EdgeForge is made and tested without an Android device. A test checks that
// every file and manifest key that this snippet names is in an exported artifact, and the same
// runner runs the artifact in examples/executorch_runner.py.
//
// An ExecuTorch artifact on Android. Add org.pytorch:executorch-android, of the release that
// EdgeForge's extra `executorch` names, and copy the artifact's folder to the device's storage:
// `model.pte`, `tokenizer.json` and `edgeforge.json` are read here.

package org.example.edgeforge

import java.io.File
import org.json.JSONObject
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

/**
 * Continues a text with the likeliest tokens. Call it on a background thread.
 *
 * @param folder the artifact.
 * @param prompt the text to continue.
 * @param length how many tokens prompt and continuation may have together.
 * @param emit gets each piece of text as it comes.
 */
fun generate(folder: File, prompt: String, length: Int, emit: (String) -> Unit) {
    val manifest = JSONObject(File(folder, "edgeforge.json").readText())
    require(manifest.getString("target") == "executorch") { "$folder is no ExecuTorch artifact" }
    // The runner's tokenizer adds what it puts around a text only when it is told to.
    val beginTokens = manifest.getJSONObject("tokenizer").getInt("num_bos")
    val callback =
        object : LlmCallback {
            override fun onResult(result: String) = emit(result)
        }
    val model = File(folder, "model.pte").path
    val tokenizer = File(folder, "tokenizer.json").path
    val greedy = 0.0f
    LlmModule(model, tokenizer, greedy).use { runner ->
        runner.load()
        val total = minOf(length, manifest.getInt("context"))
        runner.generate(prompt, total, callback, false, greedy, beginTokens, 0)
    }
}
