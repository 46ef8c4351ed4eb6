// node validate_gltf.js FILE.glb: the report of Khronos's validator on standard output, as JSON.
const { join } = require('path');
const { readFileSync } = require('fs');
const modules = process.env.PRISMFIELD_NODE_MODULES || join(__dirname, 'node_modules');
const validator = require(join(modules, 'gltf-validator'));
const file = new Uint8Array(readFileSync(process.argv[2]));
validator.validateBytes(file, { maxIssues: 0 }).then((report) => console.log(JSON.stringify(report)));
