// Writes the schema of a Terraform provider, as the program in provider/ reads it, from the provider's prebuilt CDKTF package: those packages are generated
// from what the provider itself publishes, with every resource, argument, block and computed attribute in them.
//
//   node schema.js PACKAGE_FOLDER OUTPUT_FOLDER TYPE...   TYPE is a resource's, or a data source's with "data." before it
//
// Makes OUTPUT_FOLDER/<address>/<version>/schema.json. The JavaScript and its declarations are read by TypeScript's own parser, and nothing of it is run.
// What such a package does not tell: which optional attributes the provider fills in itself when they are left out.
'use strict';
const fs = require('node:fs');
const path = require('node:path');
const ts = require('typescript');

const SIMPLE = { string: 'string', number: 'number', boolean: 'bool', any: 'dynamic' };
const GETTERS = {
  getStringAttribute: { type: 'string' },
  getNumberAttribute: { type: 'number' },
  getBooleanAttribute: { type: 'bool' },
  getListAttribute: { type: 'list', element: { type: 'string' } },
  getNumberListAttribute: { type: 'list', element: { type: 'number' } },
  getStringMapAttribute: { type: 'map', element: { type: 'string' } },
  getNumberMapAttribute: { type: 'map', element: { type: 'number' } },
  getBooleanMapAttribute: { type: 'map', element: { type: 'bool' } },
  getAnyMapAttribute: { type: 'map', element: { type: 'dynamic' } },
};
// Providers all of whose resources are of the newer kind (terraform-plugin-framework).
const NEWER = new Set(['helm']);
const lower = (name) => name[0].toLowerCase() + name.slice(1);

function walk(node, visit) {
  visit(node);
  ts.forEachChild(node, (child) => walk(child, visit));
}

// Folder of one resource: its classes, functions and interfaces, by name.
class Source {
  constructor(folder) {
    this.classes = new Map();
    this.functions = new Map();
    this.interfaces = new Map();
    this.types = new Map();
    for (const file of fs.readdirSync(folder, { recursive: true })) {
      if (/\.(js|d\.ts)$/.test(file)) this.read(path.join(folder, file));
    }
  }

  read(file) {
    const kind = file.endsWith('.js') ? ts.ScriptKind.JS : ts.ScriptKind.TS;
    const parsed = ts.createSourceFile(file, fs.readFileSync(file, 'utf8'), ts.ScriptTarget.Latest, false, kind);
    for (const node of parsed.statements) {
      if (ts.isInterfaceDeclaration(node)) this.interfaces.set(node.name.text, node);
      if (file.endsWith('.d.ts')) continue;
      if (ts.isClassDeclaration(node)) this.classes.set(node.name.text, node);
      if (ts.isFunctionDeclaration(node)) this.functions.set(node.name.text, node);
      this.readType(node);
    }
  }

  // "EksCluster.tfResourceType = 'aws_eks_cluster'"
  readType(node) {
    const assigned = ts.isExpressionStatement(node) && ts.isBinaryExpression(node.expression) ? node.expression : undefined;
    if (!assigned || !ts.isPropertyAccessExpression(assigned.left) || assigned.left.name.text !== 'tfResourceType') return;
    this.types.set(assigned.right.text, assigned.left.expression.text);
  }
}

function literal(object) {
  const made = {};
  for (const property of object.properties) made[property.name.text] = property.initializer;
  return made;
}

// The object literal `const attrs = {...}` inside a function or class: what may be configured.
function configurable(node) {
  let found;
  walk(node, (each) => {
    if (ts.isVariableDeclaration(each) && each.name.text === 'attrs' && each.initializer && ts.isObjectLiteralExpression(each.initializer)) found ??= each.initializer;
  });
  return found ? literal(found) : {};
}

// Attributes that are read by "return this.getStringAttribute('arn')" and the like, and objects made by "new XList(this, 'name', isSet)".
function readable(node) {
  const simple = {};
  const objects = {};
  walk(node, (each) => {
    if (ts.isGetAccessor(each)) readGetter(each, simple);
    if (ts.isNewExpression(each)) readObject(each, objects);
  });
  return { simple, objects };
}

function readGetter(getter, into) {
  walk(getter, (each) => {
    const named = ts.isCallExpression(each) && ts.isPropertyAccessExpression(each.expression) && GETTERS[each.expression.name.text];
    if (!named || !each.arguments[0]) return;
    let isSet = false;
    walk(getter, (inner) => (isSet ||= ts.isIdentifier(inner) && inner.text === 'tolist'));
    into[each.arguments[0].text] = isSet && named.type === 'list' ? { ...named, type: 'set' } : named;
  });
}

function readObject(made, into) {
  const [owner, name, isSet] = made.arguments ?? [];
  if (!owner || owner.kind !== ts.SyntaxKind.ThisKeyword || !name || !ts.isStringLiteral(name)) return;
  const named = (ts.isPropertyAccessExpression(made.expression) ? made.expression.name : made.expression).text;
  into[name.text] = { class: named, isSet: isSet?.kind === ts.SyntaxKind.TrueKeyword };
}

const camel = (name) => name.toLowerCase().replace(/[-_]([a-z0-9])/g, (_, letter) => letter.toUpperCase());

// Which members an interface asks for, in CDKTF's spelling.
function required(source, name) {
  const declared = source.interfaces.get(name);
  if (!declared) throw new Error(`no interface ${name}`);
  return new Set(declared.members.filter((member) => member.name && !member.questionToken).map((member) => lower(member.name.text)));
}

// CDKTF renames members that would be reserved words: their values say what they are called ("struct.providerAttribute", "this._for").
function memberOf(value) {
  let found;
  walk(value, (each) => {
    if (!ts.isPropertyAccessExpression(each)) return;
    const owner = each.expression;
    if (ts.isIdentifier(owner) && owner.text === 'struct') found = each.name.text;
    if (owner.kind === ts.SyntaxKind.ThisKeyword) found = each.name.text.replace(/^_/, '');
  });
  return found;
}

// The mapper of the nested structure, "fooToHclTerraform", and the second argument of listMapperHcl around it.
function mapperOf(value) {
  let name;
  let many = false;
  let isBlockList = false;
  walk(value, (each) => {
    const text = ts.isIdentifier(each) ? each.text : '';
    if (/ToHclTerraform$/.test(text) && !/^(string|number|boolean|any)ToHclTerraform$/.test(text)) name = text;
    if (!ts.isCallExpression(each)) return;
    let called = each.expression;
    while (ts.isParenthesizedExpression(called)) called = called.expression.right ?? called.expression;
    if (!ts.isPropertyAccessExpression(called) || called.name.text !== 'listMapperHcl') return;
    many = true;
    isBlockList = each.arguments[1]?.kind === ts.SyntaxKind.TrueKeyword;
  });
  return { name, many, isBlockList };
}

function simpleType(entry) {
  const storage = entry.storageClassType.text;
  const collection = /^(string|number|boolean|any)(List|Map)$/.exec(storage);
  if (!collection) return { type: SIMPLE[storage] ?? 'dynamic' };
  const kind = entry.type.text;
  return { type: kind === 'set' || kind === 'map' ? kind : 'list', element: { type: SIMPLE[collection[1]] } };
}

class Reader {
  // legacy: of the older kind of provider, whose lists of objects may be written as arguments and as blocks, which Terraform itself takes care of.
  constructor(source, legacy) {
    this.source = source;
    this.legacy = legacy;
  }

  // node has the attributes; config names its interface; reads has its getters.
  block(node, config, reads) {
    const block = { attributes: {}, blocks: {} };
    const asked = required(this.source, config);
    for (const [name, initializer] of Object.entries(configurable(node))) {
      const entry = literal(initializer);
      const isRequired = asked.has(lower(memberOf(entry.value) ?? camel(name)));
      this.member(block, name, entry, isRequired);
    }
    this.computed(block, reads);
    return block;
  }

  member(block, name, entry, isRequired) {
    if (entry.isBlock.kind !== ts.SyntaxKind.TrueKeyword) {
      block.attributes[name] = { ...simpleType(entry), required: isRequired, optional: !isRequired };
      return;
    }
    const { name: mapper, many, isBlockList } = mapperOf(entry.value);
    const inner = this.structure(mapper.replace(/ToHclTerraform$/, ''));
    const nesting = entry.type.text === 'struct' ? 'single' : entry.type.text;
    // Arguments that are objects, as providers of the newer kind have them, are told from blocks by this alone.
    const isAttribute = many ? !isBlockList : nesting === 'single' && name !== 'timeouts';
    if (isAttribute) block.attributes[name] = { ...this.objects(nesting, inner), required: isRequired, optional: !isRequired };
    else block.blocks[name] = { nesting, required: isRequired, one: !many, block: inner };
  }

  objects(nesting, inner) {
    if (this.legacy && nesting !== 'single') return { type: nesting, element: { type: 'object', nested: inner } };
    return { type: `nested-${nesting}`, nested: inner };
  }

  structure(name) {
    const upper = name[0].toUpperCase() + name.slice(1);
    const node = this.source.functions.get(`${name}ToHclTerraform`);
    return this.block(node, upper, this.source.classes.get(`${upper}OutputReference`));
  }

  computed(block, node) {
    if (!node) return;
    const { simple, objects } = readable(node);
    for (const [name, kind] of Object.entries(simple)) {
      if (!block.blocks[name]) block.attributes[name] ??= { ...kind, computed: true };
    }
    for (const [name, made] of Object.entries(objects)) {
      if (!block.attributes[name] && !block.blocks[name]) block.attributes[name] = this.computedObject(made);
    }
    // An id may be given where it may be, and is there in any case.
    if (block.attributes.id?.optional) block.attributes.id.computed = true;
  }

  computedObject(made) {
    const single = made.class.endsWith('OutputReference');
    const name = made.class.replace(/(List|Map|OutputReference)$/, '');
    const inner = { attributes: {}, blocks: {} };
    this.computed(inner, this.source.classes.get(`${name}OutputReference`));
    const object = { type: 'object', nested: inner };
    if (single) return { ...object, computed: true };
    return { type: made.isSet ? 'set' : made.class.endsWith('Map') ? 'map' : 'list', element: object, computed: true };
  }
}

function describe(folder, type, legacy) {
  const source = new Source(folder);
  const name = source.types.get(type);
  if (!name) return undefined;
  const node = source.classes.get(name);
  const hcl = node.members.find((member) => member.name?.text === 'synthesizeHclAttributes');
  return new Reader(source, legacy).block(hcl ?? node, `${name}Config`, node);
}

// The folder of a type: "aws_eks_cluster" is in "eks-cluster", and a data source in "data-aws-eks-cluster".
function folderOf(lib, provider, wanted) {
  const [, data, type] = /^(data\.)?(.*)$/.exec(wanted);
  const bare = type.slice(provider.length + 1).replaceAll('_', '-');
  return path.join(lib, data ? `data-${provider}-${bare}` : bare);
}

function readProvider(lib, legacy) {
  const source = new Source(path.join(lib, 'provider'));
  const [name] = source.types.values();
  const node = source.classes.get(name);
  const hcl = node.members.find((member) => member.name?.text === 'synthesizeHclAttributes');
  const block = new Reader(source, legacy).block(hcl, `${name}Config`, undefined);
  // Terraform's own, and of no provider.
  delete block.attributes.alias;
  return block;
}

function main([folder, output, ...wanted]) {
  const { cdktf } = JSON.parse(fs.readFileSync(path.join(folder, 'package.json'), 'utf8'));
  const { name: address, version } = cdktf.provider;
  const provider = address.split('/').at(-1);
  const lib = path.join(folder, 'lib');
  const legacy = !NEWER.has(provider);
  const schema = { address, provider: readProvider(lib, legacy), resources: {}, data: {} };
  for (const each of wanted) {
    const type = each.replace(/^data\./, '');
    const at = folderOf(lib, provider, each);
    const block = fs.existsSync(at) ? describe(at, type, legacy) : undefined;
    if (block) schema[each.startsWith('data.') ? 'data' : 'resources'][type] = block;
    else process.stderr.write(`${address} ${version} has no ${each}\n`);
  }
  const to = path.join(output, address, version);
  fs.mkdirSync(to, { recursive: true });
  fs.writeFileSync(path.join(to, 'schema.json'), JSON.stringify(schema, undefined, 1));
  process.stdout.write(`${address} ${version}\n`);
}

main(process.argv.slice(2));
