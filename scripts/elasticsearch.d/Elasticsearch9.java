// Starts one Elasticsearch 9.2 node from its Maven artefacts; called by scripts/elasticsearch.
//
// Arguments: HOME, PORT_FILE, then settings as KEY=VALUE. The port that was bound is written to PORT_FILE.
// The packaged main class wants its arguments in a binary form on stdin, from a launcher that is not on Maven Central.

import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.Map;
import java.util.Set;
import org.elasticsearch.common.logging.LogConfigurator;
import org.elasticsearch.common.settings.Settings;
import org.elasticsearch.env.Environment;
import org.elasticsearch.http.HttpServerTransport;
import org.elasticsearch.node.InternalSettingsPreparer;
import org.elasticsearch.node.Node;
import org.elasticsearch.plugins.PluginsLoader;

public class Elasticsearch9 {
    public static void main(String[] args) throws Exception {
        // Before anything else: classes of the server look for the logger in their static initialisers.
        LogConfigurator.configureESLogging();
        Path home = Path.of(args[0]);
        Settings.Builder settings = Settings.builder().put("path.home", home.toString());
        for (int i = 2; i < args.length; i++) {
            String[] pair = args[i].split("=", 2);
            settings.put(pair[0], pair[1]);
        }
        String name = settings.get("node.name");
        Environment env = InternalSettingsPreparer.prepareEnvironment(settings.build(), Map.of(), home.resolve("config"), () -> name);
        LogConfigurator.setNodeName(name);
        LogConfigurator.configure(env, true);
        PluginsLoader plugins = PluginsLoader.createPluginsLoader(
            PluginsLoader.loadModulesBundles(env.modulesDir()), Set.of(), Map.of());
        Node node = new Node(env, plugins);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                node.close();
            } catch (Exception e) {
                e.printStackTrace();
            }
        }));
        node.start();
        int port = node.injector().getInstance(HttpServerTransport.class).boundAddress().publishAddress().getPort();
        Path file = Path.of(args[1]);
        Path half = Path.of(args[1] + ".new");
        Files.writeString(half, port + "\n");
        Files.move(half, file, StandardCopyOption.ATOMIC_MOVE);
        // The threads of a node are daemons; the shutdown hook ends this.
        Thread.currentThread().join();
    }
}
