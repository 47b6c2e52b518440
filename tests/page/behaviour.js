// What the page's script does, against a server that this script plays: what it keeps when the page changes,
// what its buttons send, and what it says when the service does not answer.
// usage: node behaviour.js FOLDER-OF-PAGES POLICY
'use strict';
const fs = require('node:fs');
const http = require('node:http');
const path = require('node:path');
const {accessible, end, expect, open, start} = require('./browser.js');

const [folder, policy] = process.argv.slice(2);
const example = name => fs.readFileSync(path.join(folder, name + '.html'), 'utf8');

// The service as the page sees it.
const service = {html: '', status: 200, acts: [], answer: {status: 200, body: {done: 'Done as asked.'}}};
const server = http.createServer((request, response) => {
  const reply = (status, type, body) => {
    response.writeHead(status, {'Content-Type': type, 'Content-Security-Policy': policy, 'Cache-Control': 'no-store'});
    response.end(body);
  };
  if (request.method === 'GET') {
    reply(service.status, 'text/html; charset=utf-8', service.status === 200 ? service.html : 'no');
    return;
  }
  let body = '';
  request.on('data', part => body += part).on('end', () => {
    service.acts.push({path: request.url, type: request.headers['content-type'], body: JSON.parse(body)});
    reply(service.answer.status, 'application/json', JSON.stringify(service.answer.body));
  });
});
const listen = port => new Promise(done => server.listen(port, '127.0.0.1', done));

// As if the reader had come back to the page: it asks at once, and this waits until the answer is shown.
async function refreshed(page) {
  const answered = page.waitForResponse(response => response.request().method() === 'GET');
  await page.evaluate(() => document.dispatchEvent(new Event('visibilitychange')));
  await (await answered).finished();
  await page.evaluate(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))));
}

async function keepsWhatTheReaderDoes(page) {
  await page.locator('#ledger input[name=destination]').fill('hooks');
  await page.locator('#bars summary').click();
  const menu = page.locator('#flows .menu').nth(3);
  await menu.locator('summary').click();
  await menu.locator('button').nth(1).focus();
  const [row, scroll] = [await menu.locator('xpath=ancestor::tr').innerText(), await page.evaluate(() => scrollY)];
  await page.evaluate(() => document.querySelectorAll('#ledger tr').forEach(row => row.marked = true));

  // The first two rows go, so all others move up; a row is new; and things go wrong.
  service.html = example('trouble').replace(/<tr id="f.*?<\/tr><tr id="f.*?<\/tr>/s, '').replace('<tr id="r10412"', '<tr id="r10413"></tr><tr id="r10412"');
  await refreshed(page);

  expect(await page.title() === '4 need attention – what left databox.local', 'the title tells: ' + await page.title());
  expect((await page.locator('link[rel=icon]').getAttribute('href')).includes('c2410c'), 'the icon has the colour of trouble');
  expect(await page.locator('#todo li').count() === 4, 'what needs attention has appeared');
  expect(await page.locator('#ledger input[name=destination]').inputValue() === 'hooks', 'what was typed is still there');
  expect(await page.locator('#bars details').evaluate(details => details.open), 'the table is still open');
  const open = page.locator('#flows .menu[open]');
  expect(await open.count() === 1, 'one menu is open');
  expect((await open.locator('xpath=ancestor::tr').innerText()).split('\n')[0] === row.split('\n')[0], 'and it is that of the same row');
  expect(await open.locator('button').nth(1).evaluate(button => button === document.activeElement), 'the focus is where it was');
  expect(await page.locator('#r10411').evaluate(row => row.marked), 'rows that stay are the same elements');
  expect(await page.evaluate(() => scrollY) >= scroll, 'the page has not jumped up');

  await page.keyboard.press('Escape');
  expect(await open.count() === 0, 'Escape closes the menu');
  expect(await page.evaluate(() => document.activeElement.tagName) === 'SUMMARY', 'and the focus is on what opened it');
  service.html = example('trouble');
  await refreshed(page);
  expect(await page.locator('#flows tbody tr').count() === 12, 'rows come back');
}

// Clicks each button there is, one after the other, and says yes to what it asks.
async function everyButtonSendsWhatItSays(page) {
  const count = await page.locator('[data-act]').count();
  const acts = new Set();
  for (let index = 0; index < count; index += 1) {
    const button = page.locator('[data-act]').nth(index);
    const {act, body, ask} = await button.evaluate(button => ({...button.dataset}));
    const words = await button.evaluate(button => button.textContent);
    const inMenu = await button.evaluate(button => !!button.closest('.menu'));
    if (inMenu) await button.locator('xpath=ancestor::details/summary').click();
    service.acts.length = 0;
    await button.click();
    if (ask) {
      expect(await page.locator('#ask').isVisible(), `“${words}” asks before it acts`);
      expect(service.acts.length === 0, `“${words}” sends nothing before the answer`);
      if (index < 40) await accessible(page, `the question of “${words}”`);
      if (act === 'label') await page.locator('#ask-name').fill('  my app ');
      await page.locator('#ask-yes').click();
    }
    await page.locator('#said', {hasText: 'Done as asked.'}).waitFor();
    const [sent] = service.acts;
    expect(service.acts.length === 1 && sent.path === '/api/' + act && sent.type === 'application/json', `“${words}” sends one act`);
    const wanted = JSON.parse(body);
    if (act === 'label') wanted.label = 'my app';
    if (words.includes('tomorrow')) {
      const seconds = Number(/^(\d+)s$/.exec(sent.body.for)[1]);
      expect(seconds > 8 * 3600 - 1 && seconds < 33 * 3600, `until tomorrow at 8 is ${seconds} s away`);
      delete sent.body.for;
    }
    expect(JSON.stringify(sent.body) === JSON.stringify(wanted), `“${words}” sends ${JSON.stringify(sent.body)}`);
    acts.add(act);
    await page.locator('#said button').click();
  }
  const wanted = ['cancel', 'forget', 'label', 'pause', 'resume', 'retry', 'seen', 'show'];
  const known = [...acts].sort().join();
  return {known, wanted: wanted.join()};
}

async function saysNo(page) {
  service.acts.length = 0;
  const cancel = page.locator('#waiting [data-act=cancel]').first();
  await cancel.locator('xpath=ancestor::details/summary').click();
  await cancel.click();
  expect(await page.locator('#ask-no').evaluate(button => button === document.activeElement), 'the focus is on the answer that does nothing');
  await page.keyboard.press('Enter');
  await cancel.locator('xpath=ancestor::details/summary').click();
  await cancel.click();
  await page.keyboard.press('Escape');
  await page.locator('#ask').waitFor({state: 'hidden'});
  await refreshed(page);
  expect(service.acts.length === 0, 'nothing is sent when the answer is no');
}

async function showsWhatTheServiceSays(page) {
  const now = page.locator('#waiting [data-act=retry]').first();
  service.answer = {status: 409, body: {error: {code: 'on_its_way', message: 'it is being sent now\u202e: <b>wait</b>'}}};
  await now.click();
  await page.locator('#said', {hasText: 'it is being sent now\\u{202e}: <b>wait</b>'}).waitFor();
  service.answer = {status: 500, body: 'no JSON of ours'};
  await now.click();
  await page.locator('#said', {hasText: 'status 500'}).waitFor();

  service.answer = {status: 200, body: {done: 'It waits.', uri: 'https://hooks.example.com/secret', payload: '{"a":"<script>alert(1)</script>\u202e"}'}};
  const show = page.locator('[data-act=show]').first();
  await show.locator('xpath=ancestor::details/summary').click();
  await show.click();
  await page.locator('#ask-body', {hasText: '{"a":"<script>alert(1)</script>\\u{202e}"}'}).waitFor();
  await page.locator('#ask-text', {hasText: 'https://hooks.example.com/secret'}).waitFor();
  await accessible(page, 'a payload');
  await page.locator('#ask-no').click();
  service.answer = {status: 200, body: {done: 'Done as asked.'}};
}

async function saysWhenItIsOffline(page) {
  const {port} = server.address();
  const title = await page.title();
  server.closeAllConnections();
  await new Promise(done => server.close(done));
  // By its own clock.
  await page.locator('#offline', {hasText: 'does not answer'}).waitFor();
  expect((await page.title()).startsWith('Offline'), 'the title says so');
  await accessible(page, 'offline');
  await page.locator('#waiting [data-act=retry]').first().click();
  await page.locator('#said', {hasText: 'may not have been done'}).waitFor();
  await listen(port);
  await page.locator('#offline:empty').waitFor({state: 'attached'});
  expect(await page.title() === title, 'the title is back: ' + await page.title());

  service.status = 503;
  await refreshed(page);
  await page.locator('#offline', {hasText: 'status 503'}).waitFor();
  service.status = 401;
  await refreshed(page);
  await page.locator('#offline', {hasText: 'export-service link'}).waitFor();
  service.status = 200;
  await refreshed(page);
  await page.locator('#offline:empty').waitFor({state: 'attached'});
}

async function noticesAnOldLedger(page) {
  const says = text => page.locator('#remembered', {hasText: text}).waitFor();
  await says('grown from');
  service.html = example('trouble').replaceAll('10412:5d41', '10400:5d41').replace('data-seq="10412"', 'data-seq="10400"');
  await refreshed(page);
  await says('not the ledger that this browser saw');
  await refreshed(page);
  await says('10412:5d41');
  service.html = example('trouble').replaceAll('5d41402a', '00000000');
  await refreshed(page);
  await says('not the ledger that this browser saw');
  await page.getByRole('button', {name: 'Remember this one'}).click();
  await says('from now on');
  await refreshed(page);
  await says('grown from');
}

async function works(keyboard) {
  service.acts.length = 0;
  await keyboard.press('Tab');
  await keyboard.press('Tab');
  await keyboard.press('Enter');
  await keyboard.press('Tab');
  await keyboard.press('Tab');
  await keyboard.press('Enter');
}

async function main() {
  await listen(0);
  const browser = await start();
  const at = `http://127.0.0.1:${server.address().port}/`;
  service.html = example('busy');
  const page = await open(browser, {}, /Failed to load resource/);
  await page.goto(at);
  await keepsWhatTheReaderDoes(page);
  const trouble = await everyButtonSendsWhatItSays(page);
  await saysNo(page);
  await showsWhatTheServiceSays(page);
  await saysWhenItIsOffline(page);
  await noticesAnOldLedger(page);

  service.html = example('paused');
  await page.goto(at);
  const paused = await everyButtonSendsWhatItSays(page);
  const known = [...new Set([...trouble.known.split(','), ...paused.known.split(',')])].sort().join();
  expect(known === trouble.wanted, 'every act has a button: ' + known);

  service.html = example('busy');
  await page.goto(at);
  await works(page.keyboard);
  await page.locator('#said', {hasText: 'Done as asked.'}).waitFor();
  expect(JSON.stringify(service.acts[0].body) === '{"subject":"all","for":"1h"}', 'the keyboard pauses for an hour: ' + JSON.stringify(service.acts));

  service.html = example('hostile');
  await page.goto(at);
  await refreshed(page);
  expect(await page.locator('img, #main script').count() === 0, 'names do not become elements when the page changes');

  server.close();
  server.closeAllConnections();
  await end(browser);
}

main().catch(error => {
  console.error(error);
  process.exit(1);
});
