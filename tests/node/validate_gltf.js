// node validate_gltf.js NODE_MODULES FILE.glb: the report of Khronos's validator on standard output, as JSON.
const { createRequire } = require('module');
const { readFileSync } = require('fs');
const [modules, file] = process.argv.slice(2);
const validator = createRequire(modules + '/')('gltf-validator');
validator.validateBytes(new Uint8Array(readFileSync(file)), { maxIssues: 0 }).then((report) => console.log(JSON.stringify(report)));
