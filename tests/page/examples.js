// Opens each example page as the service would serve it: wide, on a phone, dark, and without JavaScript.
// usage: node examples.js FOLDER-OF-PAGES FOLDER-FOR-PICTURES POLICY
'use strict';
const fs = require('node:fs');
const http = require('node:http');
const path = require('node:path');
const zlib = require('node:zlib');
const {PHONE, accessible, end, expect, fits, open, picture, start, valid} = require('./browser.js');

const [folder, pictures, policy] = process.argv.slice(2);

function serve(pages) {
  const server = http.createServer((request, response) => {
    const page = pages.get(new URL(request.url, 'http://x').pathname.slice(1));
    response.writeHead(page ? 200 : 404, {'Content-Type': 'text/html; charset=utf-8', 'Content-Security-Policy': policy});
    response.end(page || 'there is no such page');
  });
  return new Promise(done => server.listen(0, '127.0.0.1', () => done(server)));
}

async function main() {
  const pages = new Map(fs.readdirSync(folder).map(file => [path.parse(file).name, fs.readFileSync(path.join(folder, file), 'utf8')]));
  const server = await serve(pages);
  const at = name => `http://127.0.0.1:${server.address().port}/${name}`;
  const browser = await start();

  // What the program carries: the page without anybody's data.
  const fresh = pages.get('fresh');
  const zipped = zlib.gzipSync(fresh).length;
  expect(Buffer.byteLength(fresh) <= 50_000, `the page has ${Buffer.byteLength(fresh)} bytes`);
  expect(zipped <= 15_000, `the page has ${zipped} bytes when compressed`);

  for (const [name, html] of pages) {
    console.log(`${name}: ${Buffer.byteLength(html)} bytes, ${zlib.gzipSync(html).length} compressed`);
    await valid(html, name);
    for (const [kind, options] of Object.entries({
      wide: {},
      phone: {viewport: PHONE, isMobile: true, hasTouch: true},
      dark: {colorScheme: 'dark'},
      plain: {javaScriptEnabled: false},
    })) {
      // The others differ from `busy` in their bars only.
      if (kind !== 'wide' && (name === 'day' || name === 'year')) continue;
      const page = await open(browser, options);
      page.on('request', request => expect(new URL(request.url()).origin === new URL(at('')).origin || request.url().startsWith('data:'),
        `${name}: it asks for ${request.url()}`));
      await page.goto(at(name));
      await fits(page, `${name} ${kind}`);
      if (kind !== 'plain') await accessible(page, `${name} ${kind}`);
      expect(await page.locator('img, iframe, #main script, [onerror]').count() === 0, `${name}: it holds elements from outside`);
      const text = await page.locator('body').innerText();
      expect(!/[\u202e\u200b\u0007\0]/.test(text), `${name}: it shows characters that cannot be seen`);
      expect(await page.locator('[data-act]').first().isVisible() === false || kind !== 'plain', `${name} ${kind}: it has buttons that do nothing`);
      await picture(page, pictures, `${name}-${kind}`);
      // Those in README.
      if (name === 'trouble' && kind === 'wide') await picture(page, pictures, 'readme', false);
      if (name === 'trouble' && kind === 'dark') {
        await page.setViewportSize({width: 390, height: 800});
        await picture(page, pictures, 'readme-phone', false);
      }
      await page.context().close();
    }
  }
  server.close();
  await end(browser);
}

main().catch(error => {
  console.error(error);
  process.exit(1);
});
