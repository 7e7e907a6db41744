// node transformers_js.mjs FOLDER PROMPTS: 16 greedy ids after each of PROMPTS (JSON), EOS left out, of FOLDER/out.
import { AutoModelForCausalLM, Tensor, env } from '@huggingface/transformers';

env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const model = await AutoModelForCausalLM.from_pretrained('out');
for (const prompt of JSON.parse(process.argv[3])) {
  const shape = [1, prompt.length];
  const ids = await model.generate({
    input_ids: new Tensor('int64', BigInt64Array.from(prompt, BigInt), shape),
    attention_mask: new Tensor('int64', new BigInt64Array(prompt.length).fill(1n), shape),
    max_new_tokens: 16, min_new_tokens: 16, do_sample: false,
  });
  console.log(JSON.stringify(ids.tolist()[0].slice(prompt.length).map(Number)));
}
