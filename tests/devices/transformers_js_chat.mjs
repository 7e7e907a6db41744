// node transformers_js_chat.mjs FOLDER MESSAGES: ids of the prompt that MESSAGES (JSON) give, and of the answer to it.
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';

env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const tokenizer = await AutoTokenizer.from_pretrained('out');
const model = await AutoModelForCausalLM.from_pretrained('out');
const inputs = tokenizer.apply_chat_template(JSON.parse(process.argv[3]), {
  add_generation_prompt: true, return_dict: true,
});
const prompt = inputs.input_ids.tolist()[0].map(Number);
const ids = await model.generate({ ...inputs, max_new_tokens: 20, do_sample: false });
console.log(JSON.stringify({ prompt, answer: ids.tolist()[0].slice(prompt.length).map(Number) }));
