// The page of a real service, from its first minute on: apps submit to it, destinations are this script's, and
// each act of the owner is clicked in a real browser and its effect seen where it has to be.
// usage: node service.js PROGRAM APPS-URL OWNER-URL OWNER-TOKEN FOLDER-FOR-PICTURES, and the secret in EXPORT_SECRET
'use strict';
const http = require('node:http');
const {execFileSync} = require('node:child_process');
const {PHONE, accessible, end, expect, fits, open, picture, start, valid} = require('./browser.js');

const [program, apps, owner, login, pictures] = process.argv.slice(2);
const MARK = 'MARK-payload';

// A destination that notes what arrives. It can be down: nothing listens there.
class Destination {
  constructor() {
    this.arrived = [];
    // Its own address: the port of one that is down could be given to somebody else at 127.0.0.1.
    const part = () => 1 + Math.floor(Math.random() * 250);
    this.address = `127.${64 + Math.floor(Math.random() * 64)}.${part()}.${part()}`;
    this.server = http.createServer((request, response) => {
      let body = '';
      request.on('data', part => body += part).on('end', () => {
        this.arrived.push(body);
        for (const wake of this.waiting || []) wake();
        response.end('thanks');
      });
    });
  }
  async up() {
    await new Promise(done => this.server.listen(this.port || 0, this.address, done));
    this.port = this.server.address().port;
    return this;
  }
  down() {
    this.server.closeAllConnections();
    return new Promise(done => this.server.close(done));
  }
  get url() {
    return `http://${this.address}:${this.port}/in/secret-path`;
  }
  get host() {
    return `http://${this.address}:${this.port}`;
  }
  // Waits until so many exports have arrived.
  async has(count) {
    while (this.arrived.length < count) await new Promise(done => this.waiting = [done]);
  }
}

const tokens = new Map();
function token(url, id = '') {
  if (!tokens.has(url + id)) {
    const minted = execFileSync(program, ['token', '--destination', url, '--path', '*', '--id', id], {encoding: 'utf8', env: process.env});
    tokens.set(url + id, minted.trim());
  }
  return tokens.get(url + id);
}

const agents = new Map();
// One app is one address. Resolves to the status and what the service says.
function submit(app, url, data, given) {
  const localAddress = `127.0.0.${app + 10}`;
  if (!agents.has(app)) agents.set(app, new http.Agent({keepAlive: true, maxSockets: 4, localAddress}));
  return new Promise((done, failed) => {
    const request = http.request(apps + '/export', {method: 'POST', agent: agents.get(app), auth: (given || token(url)) + ':'}, response => {
      let body = '';
      response.on('data', part => body += part).on('end', () => done({status: response.statusCode, ...JSON.parse(body)}));
    });
    request.on('error', failed).end(JSON.stringify({uri: url, data}));
  });
}

// Until it is so, with what the page shows at each refresh.
const shows = (page, selector, text) => page.locator(selector, {hasText: text}).first().waitFor();

async function act(page, scope, act, {yes = false, name, words} = {}) {
  let button = scope.locator(`[data-act=${act}]`);
  if (words) button = button.filter({hasText: words});
  button = button.first();
  if (await button.evaluate(button => !!button.closest('.menu'))) await button.locator('xpath=ancestor::details/summary').click();
  await button.click();
  if (name !== undefined) await page.locator('#ask-name').fill(name);
  if (yes) await page.locator('#ask-yes').click();
  if (act !== 'show') {
    await page.locator('#said span').waitFor();
    const said = await page.locator('#said').innerText();
    await page.locator('#said button').click();
    return said;
  }
}

async function main() {
  const browser = await start();
  const context = {httpCredentials: {username: login, password: '', origin: new URL(owner).origin}};
  const page = await open(browser, context, /status of 401/);
  await page.goto(owner);

  // A fresh box says how to begin, with its own address.
  await shows(page, '#attention', 'Nothing has left this box yet.');
  expect((await page.locator('#first pre').innerText()).includes(apps + '/lp/export'), 'the first steps have the address of this service');
  await picture(page, pictures, 'service-fresh');

  // The first export is seen without reloading the page.
  const good = await new Destination().up();
  await submit(0, good.url, {[MARK]: 0});
  await shows(page, '#attention', 'Everything that was to leave has left.');
  await shows(page, '#flows', good.host);
  await shows(page, '#ledger', '200');
  expect(await page.locator('#first').count() === 0, 'the first steps are gone');
  expect(await page.locator('#flows .new').count() === 1, 'its destination is new');
  await act(page, page.locator('#flows'), 'seen');
  await page.locator('#flows .new').waitFor({state: 'detached'});

  // Twelve apps, 10,000 exports, eight destinations.
  const destinations = [good];
  while (destinations.length < 8) destinations.push(await new Destination().up());
  const count = 10_000;
  const apart = Array.from({length: 12}, async (_, app) => {
    for (let index = app; index < count; index += 12) {
      const {status} = await submit(app, destinations[index % (app < 6 ? 3 : 8)].url, {[MARK]: index, text: 'x'.repeat(index % 700)});
      expect(status === 200, `app ${app} is told ${status}`);
    }
  });
  await Promise.all(apart);
  await shows(page, '#today dd', '10,001');
  await shows(page, '#attention', 'Everything that was to leave has left.');
  const sum = destinations.reduce((sum, one) => sum + one.arrived.length, 0);
  expect(sum === count + 1, `${sum} exports have arrived`);
  await picture(page, pictures, 'service-busy');
  await accessible(page, 'busy');
  await valid(await (await page.request.get(owner)).text(), 'busy');
  const began = Date.now();
  await page.request.get(owner);
  console.log(`the page of 10,001 exports takes ${Date.now() - began} ms in this build`);

  // The ledger: filters, older rows, one export's rows, CSV.
  await page.locator('#ledger input[name=who]').fill('127.0.0.21');
  await page.getByRole('button', {name: 'Filter'}).click();
  await page.waitForURL(/who=127/);
  const senders = await page.locator('#ledger tbody td:nth-child(2)').allInnerTexts();
  expect(senders.length === 50 && senders.every(who => who === '127.0.0.21'), 'the filter shows the rows of one app');
  const first = await page.locator('#ledger tbody tr').first().getAttribute('id');
  await page.getByRole('link', {name: 'Older'}).click();
  await page.waitForURL(/before=/);
  expect(await page.locator('#' + first).count() === 0, 'older rows are others');
  await page.locator('#ledger tbody a').first().click();
  await page.waitForURL(/id=/);
  expect(await page.locator('#ledger tbody tr').count() === 1, 'one export has one row');
  const csv = await page.request.get(new URL(await page.getByRole('link', {name: 'CSV'}).getAttribute('href'), owner).href);
  expect(csv.ok() && (await csv.text()).trim().split('\n').length === 2, 'the same as CSV has its head and one row');
  const json = await page.request.get(new URL(await page.getByRole('link', {name: 'JSON'}).getAttribute('href'), owner).href);
  expect(json.ok() && (await json.json()).rows.length === 1, 'the same as JSON has one row');
  await page.goto(owner + '?range=day');
  await shows(page, '#bars nav [aria-current]', '24 hours');
  expect(await page.locator('#bars .hit').count() >= 1, 'the bars of 24 hours are there');

  // Something is refused, and says why.
  await submit(3, good.url, {[MARK]: 1}, 'not-a-token');
  await page.goto(owner);

  // A destination dies: what waits is shown with why. It is tried now, and arrives.
  const dead = await new Destination().up();
  await dead.down();
  const one = await submit(1, dead.url, {[MARK]: 'first'});
  await shows(page, '#waiting', 'connection refused');
  await shows(page, '#flows .state.bad', 'failing');
  expect((await page.title()).includes('attention'), 'the title tells of it: ' + await page.title());
  await picture(page, pictures, 'service-dead');
  await accessible(page, 'a dead destination');
  const row = page.locator('#waiting tbody tr').first();
  await act(page, row, 'show');
  await shows(page, '#ask-body', MARK);
  expect((await page.locator('#ask').innerText()).includes(dead.url), 'what is shown has the full URL');
  await page.locator('#ask-no').click();
  const phone = await open(browser, {...context, viewport: PHONE, isMobile: true, hasTouch: true, colorScheme: 'dark'}, /status of 401/);
  await phone.goto(owner);
  await fits(phone, 'on a phone');
  await picture(phone, pictures, 'service-phone', false);
  const plain = await open(browser, {...context, javaScriptEnabled: false}, /status of 401/);
  await plain.goto(owner);
  await shows(plain, '#waiting', 'connection refused');
  expect((await plain.locator('header').innerText()).includes('export-service pause --for 1h'), 'without JavaScript the page names the commands');
  await dead.up();
  await act(page, row, 'retry');
  await dead.has(1);
  await shows(page, '#waiting', 'Nothing waits.');

  // Paused: nothing leaves, until it is resumed.
  await act(page, page.locator('header'), 'pause', {words: 'For 1 hour'});
  await shows(page, 'header .state.held', 'Paused until');
  await submit(1, good.url, {[MARK]: 'held'});
  await shows(page, '#waiting', 'when resumed');
  await picture(page, pictures, 'service-paused', false);
  const before = good.arrived.length;
  await act(page, page.locator('header'), 'resume');
  await good.has(before + 1);
  await shows(page, 'header .state.ok', 'Sending');

  // One destination paused: another's exports leave, its own wait, and are cancelled.
  const flow = page.locator('#flows tbody tr').filter({hasText: dead.host});
  await act(page, flow, 'pause', {words: 'until I resume'});
  await shows(page, '.pauses', dead.host);
  const cancelled = await submit(1, dead.url, {[MARK]: 'cancelled'});
  const all = await submit(1, dead.url, {[MARK]: 'cancelled too'});
  await submit(2, good.url, {[MARK]: 'passes'});
  await good.has(before + 2);
  await shows(page, '#waiting', '2 exports');
  await act(page, page.locator('#waiting tbody tr').first(), 'cancel', {yes: true, words: 'oldest'});
  await shows(page, '#waiting', '1 export');
  await act(page, page.locator('#waiting tbody tr').first(), 'cancel', {yes: true, words: 'all'});
  await shows(page, '#waiting', 'Nothing waits.');
  await act(page, flow, 'resume');
  await page.locator('.pauses').waitFor({state: 'detached'});
  await submit(1, dead.url, {[MARK]: 'after'});
  await dead.has(2);
  expect(dead.arrived[1].includes('after'), 'what was cancelled never arrives');
  expect([one, cancelled, all].every(({id}) => id), 'all were accepted');

  // An app whose identifier attacks the page is shown as text, and can be named and forgotten like others.
  const attacker = `"><img src=x onerror=alert(1)></script><script>alert(2)</script>' all who:x \u202e\u200b`;
  await submit(4, good.url, {[MARK]: 'attack'}, token(good.url, attacker));
  const attack = page.locator('#flows tbody tr').filter({hasText: 'onerror=alert(1)'});
  await attack.waitFor();
  expect((await attack.innerText()).includes("' all who:x \\u{202e}\\u{200b}"), 'what cannot be seen is shown');
  await act(page, attack, 'label', {name: 'attacker', yes: true});
  await attack.filter({hasText: 'attacker'}).waitFor();
  await act(page, attack, 'pause', {words: 'this app'});
  await shows(page, '.pauses', 'onerror');
  await act(page, attack, 'resume');
  await page.locator('.pauses').waitFor({state: 'detached'});
  await act(page, attack, 'forget', {yes: true, words: 'app'});
  await page.locator('#ledger', {hasText: 'forget'}).waitFor();
  expect(await page.locator('#main img, #main script').count() === 0, 'it does not become an element');

  // A name for an app, and forgetting.
  await act(page, flow, 'label', {name: 'sleep app', yes: true});
  await shows(page, '#flows', 'sleep app');
  await act(page, flow, 'forget', {yes: true, words: 'destination'});
  await shows(page, '#ledger', 'forget');
  const left = await page.locator('#ledger tbody td:nth-child(3)').allInnerTexts();
  expect(!left.some(text => text.includes(dead.host)) || left.filter(text => text.includes(dead.host)).length === 1, 'its rows are gone');

  // Nothing of a payload or a path is on the page.
  const html = await (await page.request.get(owner)).text();
  expect(!html.includes(MARK) && !html.includes('secret-path'), 'payloads and paths are not on the page');
  await shows(page, '#refused', 'unauthorized');

  for (const one of [...destinations, dead]) await one.down();
  for (const agent of agents.values()) agent.destroy();
  await end(browser);
}

main().catch(error => {
  console.error(error);
  process.exit(1);
});
