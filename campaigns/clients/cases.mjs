// What the scripts for Node share: where the server is, the questions, a line for each case.
import assert from "node:assert/strict";

export { assert };
export const [url, model, folder, python, name] = process.argv.slice(2);
export const system = "Be brief.";
export const question = "Tell me of the king.";
export const cities = ["Paris", "Rome"];
export const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: cities } },
  required: ["city"],
  additionalProperties: false,
};
export const weather = ({ city }) => {
  assert(cities.includes(city), city);
  return `It rains in ${city}.`;
};

/** A case that is done whole and then streamed; what it returns is the same, and not nothing. */
export const both = (action) => async () => {
  const whole = await action(false);
  assert(whole);
  assert.deepEqual(await action(true), whole);
};

/** Runs an object's functions in turn; exits with 1 if one failed. */
export async function run(cases) {
  for (const [name, check] of Object.entries(cases)) {
    try {
      await check();
      console.log(`ok - ${name}`);
    } catch (problem) {
      process.exitCode = 1;
      console.log(problem);
      console.log(`not ok - ${name}`);
    }
  }
  process.exit();
}
