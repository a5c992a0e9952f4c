// A portrait with Node alone: node examples/node/portrait.js localhost:8001 PROFILE REFERENCE OUT

import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const proto = fileURLToPath(new URL("../kserve.proto", import.meta.url));
const { inference } = grpc.loadPackageDefinition(loadSync(proto, { keepCase: true, longs: Number }));

// An element of type BYTES stands behind its length, which has four bytes, the lowest first.
function element(data) {
  const length = Buffer.alloc(4);
  length.writeUInt32LE(data.length);
  return Buffer.concat([length, data]);
}

function elements(data) {
  const found = [];
  for (let at = 0; at < data.length; ) {
    const end = at + 4 + data.readUInt32LE(at);
    found.push(data.subarray(at + 4, end));
    at = end;
  }
  return found;
}

// Numbers have no length before them.
function int64(value) {
  const data = Buffer.alloc(8);
  data.writeBigInt64LE(BigInt(value));
  return data;
}

const [server, profile, reference, out] = process.argv.slice(2);
const inputs = [
  ["profile", "BYTES", element(readFileSync(profile))],
  ["reference", "BYTES", element(readFileSync(reference))],
  ["seed", "INT64", int64(7)],
];
const request = {
  model_name: "ic_portrait",
  inputs: inputs.map(([name, datatype]) => ({ name, datatype, shape: [1] })),
  raw_input_contents: inputs.map(([, , data]) => data),
};
const client = new inference.GRPCInferenceService(server, grpc.credentials.createInsecure(), {
  // Else answers over 4 MiB are refused.
  "grpc.max_receive_message_length": -1,
  "grpc.enable_http_proxy": 0,
});

client.ModelInfer(request, { deadline: Date.now() + 120_000 }, (error, answer) => {
  client.close();
  if (error) {
    console.error(`${grpc.status[error.code]}: ${error.details}`);
    process.exitCode = 1;
    return;
  }
  const output = (name) => elements(answer.raw_output_contents[answer.outputs.findIndex((each) => each.name === name)]);
  writeFileSync(out, output("image")[0]);
  console.log(JSON.parse(output("metadata")[0]).stage_ms);
});
