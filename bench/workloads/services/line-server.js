// A service with a heap that changes all the time and is checked, which answers lines on port 7000: `count` with the next
// number, `check` with `ok` or `wrong: N blocks` of what it has come across, `check-all` with the same when it has looked at all.
'use strict';

const net = require('net');

// Arrays of 512 numbers, 4 KiB in V8's heap: 128 MiB together.
const BLOCKS = 32768;
const WORDS = 512;
// Blocks that are replaced every 10 ms: an eighth of the heap in a second, which the collector has to find.
const REPLACED = 40;
const TICK_MS = 10;

const heap = new Array(BLOCKS);
let counted = 0;
let wrong = 0;

// What a place holds, by where it is and how often that was replaced: 30 bits, which V8 keeps in the array itself.
function word(slot, generation, index) {
  let mixed = (Math.imul(slot, 0x9e3779b1) ^ Math.imul(generation, 0x85ebca77) ^ Math.imul(index, 0xc2b2ae3d)) >>> 0;
  mixed = Math.imul(mixed ^ (mixed >>> 15), 0x2c1b3c6d) >>> 0;
  return (mixed ^ (mixed >>> 13)) & 0x3fffffff;
}

function made(slot, generation) {
  const words = new Array(WORDS);
  for (let index = 0; index < WORDS; index++) words[index] = word(slot, generation, index);
  return { generation, words };
}

function check(slot) {
  const { generation, words } = heap[slot];
  for (let index = 0; index < WORDS; index++) {
    if (words[index] !== word(slot, generation, index)) {
      wrong++;
      return;
    }
  }
}

let next = 0;

function change() {
  for (let count = 0; count < REPLACED; count++) {
    // A stride that is prime to the number of blocks: all of them in turn, far apart.
    next = (next + 20251) % BLOCKS;
    check(next);
    heap[next] = made(next, heap[next].generation + 1);
  }
}

function answer(question) {
  switch (question) {
    case 'count':
      return String(++counted);
    case 'check-all':
      for (let slot = 0; slot < BLOCKS; slot++) check(slot);
    // falls through
    case 'check':
      return wrong === 0 ? 'ok' : `wrong: ${wrong} blocks`;
    default:
      return 'there are count, check and check-all';
  }
}

function converse(socket) {
  let rest = '';
  socket.setNoDelay(true);
  socket.on('error', () => socket.destroy());
  socket.on('data', (data) => {
    const lines = (rest + data).split('\n');
    rest = lines.pop();
    for (const line of lines) socket.write(answer(line.trim()) + '\n');
  });
}

for (let slot = 0; slot < BLOCKS; slot++) heap[slot] = made(slot, 0);
setInterval(change, TICK_MS);
net.createServer(converse).listen(7000, '0.0.0.0');
